"""What a trainer adds to the forward of one batch: one argument, ``training_step=``, of the model's own
forward.

    model(**batch, training_step=step)        through PEFT, DDP or DeepSpeed, as any forward
      └─ step.run(model, **batch)             TRL's fused loss, or two stages, or a distillation around it

TRL puts its fused forward on the model itself (``model.forward = …``), bound to it: a copy of the model would
compute with the original. It is taken off again, and goes with the step.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Replacements = Mapping[str, tuple[Callable[[Any], Any], str]]


@dataclass(frozen=True)
class FusedStep:
    """TRL's fused loss.

    Attributes:
        run: TRL's function, ``run(model, fused_lm_head=True, …)``; without ``fused_lm_head``, the model's own
            forward.
    """

    run: Callable[..., Any]


def take_off_fused_forward(model: Any, before: Any, replaced: Replacements) -> FusedStep | None:
    """Take TRL's forward off ``model`` (the transformers model itself); ``None`` where TRL put none on.

    Args:
        before: the ``forward`` that the instance had of its own before (accelerate's), or ``None``.
        replaced: what the function gets in the place of names of TRL's module, which stays as it is: name →
            what makes the new one of the old, and what is lost where TRL has no such name.
    """
    patched = vars(model).get("forward")
    if patched is before or patched is None:
        return None
    if before is None:
        del model.forward
    else:
        model.forward = before
    return FusedStep(_with_names_of_its_own(patched.__func__, replaced))


def _with_names_of_its_own(stock: types.FunctionType, replaced: Replacements) -> Callable[..., Any]:
    """A copy of ``stock`` that reads ``replaced`` instead of its module's; warns, once a name, where it asks
    for none by that name.
    """
    names = dict(stock.__globals__)
    for name, (make, lost) in replaced.items():
        if name in names and name in stock.__code__.co_names:
            names[name] = make(names[name])
        else:
            warnings.warn(
                f"TRL's fused forward has no {name} any more, which voco_plugin replaces in its own copy: "
                f"{lost}. Loss and gradients are right; tell voco_plugin's maintainers.",
                stacklevel=4,
            )
    made = types.FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    made.__kwdefaults__ = stock.__kwdefaults__
    return made


__all__ = ["FusedStep", "take_off_fused_forward"]
