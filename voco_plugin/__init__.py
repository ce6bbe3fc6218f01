"""Vision compression inside the language model: VoCo tokens for any Hugging Face vision-language model.

The names below load when first used: importing this package loads neither torch, trl, timm nor open_clip. It
changes nothing anywhere, but for one name that transformers' auto classes learn (``registration.py``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved
from .models.registration import register_when_loaded
from .registry import lazy_names

__version__ = "0.1.0"

_NAMES = {
    "VoCoConfig": ".config",
    "SequenceLayout": ".core.layout",
    "TokenVocabulary": ".core.layout",
    "LayoutError": ".core.layout",
    "attach": ".models",
    "detach": ".models",
    "is_attached": ".core.attachment",
    "attachment": ".core.attachment",
    "load": ".models",
    "compose": ".models",
    "save_voco_config": ".models",
    "VoCoProcessor": ".models.voco_processor",
    "VoCoCache": ".cache",
    "VoCoBlock": ".cache",
    "VoCoCacheError": ".cache",
    "VoCoCacheStore": ".store",
    "VoCoGenerationMixin": ".inference.mixin",
    "VoCoSession": ".inference.session",
    "answer": ".inference.answering",
    "compress_images": ".inference.answering",
    "log_likelihood": ".inference.likelihood",
    "stream_of": ".inference.prompts",
    "insert_voco_tokens": ".core.injection",
    "VoCoDataCollator": ".training.collator",
    "wrap_collator": ".training.wrapped_collator",
    "DistillConfig": ".training",
    "VoCoSFTConfig": ".training",
    "VoCoSFTTrainer": ".training",
}
_MODULES = {"registry": ".registry", "masks": ".core.masks", "metrics": ".evaluation.metrics"}

__all__ = ["__version__", *_NAMES, *_MODULES]

_load, _ = lazy_names(__name__, _NAMES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name], __name__)
    if _NAMES.get(name, "").startswith(".training"):
        from .training.trl_floor import NEED_IT, check_trl

        if name in NEED_IT:
            check_trl(name)
    return _load(name)


def __dir__() -> list[str]:
    return sorted(__all__)


_moved.install()
register_when_loaded()

if TYPE_CHECKING:
    from .cache import VoCoBlock, VoCoCache, VoCoCacheError
    from .config import VoCoConfig
    from .core.attachment import attachment, is_attached
    from .core.injection import insert_voco_tokens
    from .core.layout import LayoutError, SequenceLayout, TokenVocabulary
    from .inference.answering import answer, compress_images
    from .inference.likelihood import log_likelihood
    from .inference.mixin import VoCoGenerationMixin
    from .inference.prompts import stream_of
    from .inference.session import VoCoSession
    from .models import attach, compose, detach, load, save_voco_config
    from .models.voco_processor import VoCoProcessor
    from .store import VoCoCacheStore
    from .training import DistillConfig, VoCoSFTConfig, VoCoSFTTrainer
    from .training.collator import VoCoDataCollator
    from .training.wrapped_collator import wrap_collator
