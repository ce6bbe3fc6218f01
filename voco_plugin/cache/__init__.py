"""VoCo caches: the keys and values of compressed images, saved, combined and placed anywhere."""

from .block import VoCoBlock
from .cache import VoCoCache
from .files import VoCoCacheError
from .store import VoCoCacheStore
from .store_error import quantization_error
from .store_keys import image_key

__all__ = ["VoCoBlock", "VoCoCache", "VoCoCacheError", "VoCoCacheStore", "image_key", "quantization_error"]
