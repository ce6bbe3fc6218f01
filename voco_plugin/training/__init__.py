"""Training with TRL: the config, the trainer, and what of a model trains.

Reading order: ``config`` (the arguments), ``datasets`` (columns) and ``collator`` (batches with VoCo tokens),
``parts`` (which part of a model a parameter belongs to), ``adapters`` (PEFT for the language model and one
token row), ``model_setup`` (what a trainer starts from), ``trainer`` (puts it all together). Then what is
optional: ``packing`` and ``token_counting``, ``quantization``, ``distillation`` (Eq. 1), ``two_stage``; and
what surrounds a run: ``launch`` (which launches are refused), ``checkpoints``, ``load_weights`` (resume),
``card``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import lazy_names
from .trl_floor import NEED_IT, check_trl

__all__ = ["DistillConfig", "VoCoSFTConfig", "VoCoSFTTrainer"]

_load, __dir__ = lazy_names(
    __name__,
    {"DistillConfig": ".distillation.config", "VoCoSFTConfig": ".config", "VoCoSFTTrainer": ".trainer"},
)


def __getattr__(name: str) -> Any:
    if name in NEED_IT:
        check_trl(name)
    return _load(name)


if TYPE_CHECKING:
    from .config import VoCoSFTConfig
    from .distillation.config import DistillConfig
    from .trainer import VoCoSFTTrainer
