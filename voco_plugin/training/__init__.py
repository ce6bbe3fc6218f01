"""Training with TRL: the config, the trainer, and what of a model trains.

Reading order: ``config`` (the arguments), ``parts`` (which part of a model a parameter belongs to),
``adapters`` (PEFT for a token row and the language model alone), ``datasets`` (columns), ``weights``
(resume), ``launch`` (which launches are refused), ``distillation``, ``divergence``, ``teacher``, ``lesson``,
``distilling`` (Eq. 1), ``trainer`` (puts them together).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import lazy_names

__all__ = ["DistillConfig", "VoCoSFTConfig", "VoCoSFTTrainer"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"DistillConfig": ".distillation.config", "VoCoSFTConfig": ".config", "VoCoSFTTrainer": ".trainer"},
)

if TYPE_CHECKING:
    from .config import VoCoSFTConfig
    from .distillation.config import DistillConfig
    from .trainer import VoCoSFTTrainer
