"""VoCo caches: the keys and values of compressed images, saved, combined and placed anywhere."""

from .block import VoCoBlock
from .cache import VoCoCache
from .files import VoCoCacheError
from .store import VoCoCacheStore

__all__ = ["VoCoBlock", "VoCoCache", "VoCoCacheError", "VoCoCacheStore"]
