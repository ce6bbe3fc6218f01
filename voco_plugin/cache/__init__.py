"""VoCo caches: the keys and values of compressed images, saved, combined and placed anywhere.

``compress/`` makes them (stage 1), ``place/`` puts them under a prompt (stage 2).
"""

from typing import Any

from .._moved import moved_name
from .cache import VoCoBlock, VoCoCache
from .container import VoCoCacheError

__all__ = ["VoCoBlock", "VoCoCache", "VoCoCacheError"]


def __getattr__(name: str) -> Any:
    return moved_name(__name__, name)
