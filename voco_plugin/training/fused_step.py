"""What a trainer adds to the forward of one batch: one argument, ``training_step=``, of the model's own
forward.

    model(**batch, training_step=step)        through PEFT, DDP or DeepSpeed, as any forward
      └─ step.run(model, batch)               TRL's fused loss, or two stages, or a distillation around it

TRL puts its fused forward on the model itself (``model.forward = …``), bound to it: a copy of the model would
compute with the original. It is taken off again, and goes with the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._compat import fused_forward

_FUSED_ONLY = ("fused_lm_head", "num_items_in_batch")


@dataclass(frozen=True)
class FusedStep:
    """TRL's fused loss.

    Args:
        fused: TRL's function, ``fused(model, fused_lm_head=True, …)``.
    """

    fused: Callable[..., Any]

    def run(self, model: Any, batch: dict[str, Any]) -> Any:
        """The output of ``model`` for ``batch``: fused where it asks so, else the model's own."""
        if batch.get("fused_lm_head"):
            return self.fused(model, **batch)
        return type(model).forward(model, **{k: v for k, v in batch.items() if k != "fused_lm_head"})


def take_off_fused_forward(model: Any, before: Any) -> FusedStep | None:
    """Take TRL's forward off ``model`` (the transformers model itself); ``None`` where TRL put none on.

    Args:
        before: the ``forward`` that the instance had of its own before (accelerate's), or ``None``.
    """
    patched = vars(model).get("forward")
    if patched is before or patched is None:
        return None
    if before is None:
        del model.forward
    else:
        model.forward = before
    return FusedStep(fused_forward(patched))


__all__ = ["FusedStep", "take_off_fused_forward"]
