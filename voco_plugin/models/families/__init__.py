"""What differs between vision-language families. An unknown family gets the generic rules of ``base``."""

from __future__ import annotations

from typing import Any

from ...config import VoCoConfig
from ...core.layout import TokenVocabulary
from ...registry import families
from .base import Family, VocabularyError

for _key, _path in {
    "idefics2": "voco_plugin.models.families.idefics3:Idefics2",
    "idefics3": "voco_plugin.models.families.idefics3:Idefics3",
    "smolvlm": "voco_plugin.models.families.idefics3:Idefics3",
    "paligemma": "voco_plugin.models.families.paligemma:PaliGemma",
}.items():
    if _key not in families:
        families.register(_key, _path)

__all__ = ["Family", "VocabularyError", "family_of", "family_of_processor", "vocabulary_for"]


def family_of(config: Any) -> Family:
    """The family of a model config (by ``model_type``), or the generic one."""
    name = getattr(config, "model_type", None)
    return families.get(name)() if isinstance(name, str) and name in families else Family()


def vocabulary_for(*, processor: Any = None, config: Any = None, voco: VoCoConfig) -> TokenVocabulary:
    """The :class:`~voco_plugin.core.layout.TokenVocabulary` read from a processor and/or a model config.

    Raises:
        VocabularyError: neither names the image token, or the VoCo token has no id.
    """
    family = family_of(config) if config is not None else family_of_processor(processor)
    return family.vocabulary(config=config, processor=processor, voco=voco)


def family_of_processor(processor: Any) -> Family:
    """The family of a processor (by its class), or the generic one."""
    name = type(processor).__name__.removesuffix("Processor").lower()
    return families.get(name)() if name in families else Family()
