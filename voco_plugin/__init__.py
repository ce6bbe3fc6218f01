"""Vision compression inside the language model: VoCo tokens for any Hugging Face vision-language model.

The names below load when first used: importing this package loads neither torch, trl, timm nor open_clip. It
changes nothing anywhere, but for one name that transformers' auto classes learn (``registration.py``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "VoCoConfig": "config",
    "SequenceLayout": "layout",
    "TokenVocabulary": "layout",
    "LayoutError": "layout",
    "attach": "modeling",
    "detach": "modeling",
    "is_attached": "modeling",
    "attachment": "modeling",
    "load": "modeling",
    "compose": "modeling",
    "save_voco_config": "modeling",
    "VoCoCache": "cache",
    "VoCoBlock": "cache",
    "VoCoCacheError": "cache",
    "VoCoCacheStore": "cache",
    "VoCoGenerationMixin": "generation",
    "VoCoSession": "session",
    "VoCoDataCollator": "collator",
    "DistillConfig": "training",
    "VoCoSFTConfig": "training",
    "VoCoSFTTrainer": "training",
}
_MODULES = {"registry", "masks", "metrics"}

__all__ = ["__version__", *_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _announce() -> None:
    from .registration import register_when_loaded

    register_when_loaded()


_announce()

if TYPE_CHECKING:
    from .attached import attachment, is_attached
    from .cache import VoCoBlock, VoCoCache, VoCoCacheError, VoCoCacheStore
    from .collator import VoCoDataCollator
    from .config import VoCoConfig
    from .generation import VoCoGenerationMixin
    from .layout import LayoutError, SequenceLayout, TokenVocabulary
    from .modeling import attach, compose, detach, load, save_voco_config
    from .session import VoCoSession
    from .training import DistillConfig, VoCoSFTConfig, VoCoSFTTrainer
