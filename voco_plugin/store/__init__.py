"""Many caches: an LMDB store by the content of the image, names and videos, shards, and jobs over any number
of images (``bulk``, from ``sources``).

The names below load when first used: the command line imports ``sources`` for its options, without torch.
"""

from typing import TYPE_CHECKING

from ..registry import lazy_names

__all__ = ["VoCoCacheStore", "image_key", "quantization_error"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "VoCoCacheStore": ".store",
        "image_key": ".keys",
        "quantization_error": ".int8_error",
    },
)

if TYPE_CHECKING:
    from .int8_error import quantization_error
    from .keys import image_key
    from .store import VoCoCacheStore
