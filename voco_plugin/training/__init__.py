"""Training with TRL: the config, the trainer, and what of a model trains.

Reading order: ``config`` (the arguments), ``parts`` (which part of a model a parameter belongs to),
``adapters`` (PEFT for a token row and the language model alone), ``datasets`` (columns), ``weights``
(resume), ``launch`` (which launches are refused), ``distillation``, ``divergence``, ``teacher``, ``lesson``,
``distilling`` (Eq. 1), ``trainer`` (puts them together).
"""

from __future__ import annotations

from .config import VoCoSFTConfig
from .distillation import DistillConfig
from .trainer import VoCoSFTTrainer

__all__ = ["DistillConfig", "VoCoSFTConfig", "VoCoSFTTrainer"]
