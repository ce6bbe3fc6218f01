"""Many caches: an LMDB store by the content of the image, names and videos, shards, and jobs over any number
of images (``bulk``, from ``sources``).
"""

from .keys import image_key
from .quantization_error import quantization_error
from .store import VoCoCacheStore

__all__ = ["VoCoCacheStore", "image_key", "quantization_error"]
