"""An optimizer that the caller built on the model before the trainer changed it: attached it, or put adapters
in. What it holds must be what trains.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_WAY_OUT = (
    "make it from the model as it trains (attach it, and wrap it in PEFT, first), or give "
    "optimizer_cls_and_kwargs, which the trainer fills in"
)


class GivenOptimizer:
    """``optimizers=`` of a trainer, to be checked once the model is set up.

    Args:
        given: ``(optimizer, scheduler)``, each maybe ``None``.
        model: as the caller gave it.

    Raises:
        ValueError: the scheduler is another optimizer's, which would turn no knob of this run.
    """

    def __init__(self, given: Any, model: nn.Module) -> None:
        pair: tuple[Any, Any] = given or (None, None)
        self.optimizer, scheduler = pair
        owner = getattr(scheduler, "optimizer", None)
        if owner is not None and owner is not self.optimizer:
            which = "none is" if self.optimizer is None else "another is"
            raise ValueError(
                f"optimizers: the scheduler is that of a {type(owner).__name__}, and {which} given beside "
                "it, so it would change nothing here; give the optimizer that it was made for."
            )
        # the parameters themselves, so that an id stays theirs
        self.before = [(name, p, tuple(p.shape)) for name, p in model.named_parameters()]

    def check(self, model: nn.Module) -> None:
        """Compare what the optimizer holds with what trains in ``model``, the trainer's.

        Raises:
            ValueError: it holds tensors that are no longer the model's, or lacks some that were made here, or
                its state has their former shape.
        """
        if self.optimizer is None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        now = {id(p): name for name, p in model.named_parameters()}
        known = {id(p): name for name, p, _ in self.before}
        gone = [name for name, p, _ in self.before if id(p) in held and id(p) not in now]
        new = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held | set(known)]
        stale = [n for n, p, s in self.before if tuple(p.shape) != s and self.optimizer.state.get(p)]
        for names, why in (
            (gone, "holds {}, which another tensor has replaced in the model since"),
            (new, "was made before {} was, so that would not train"),
            (stale, "has stepped, and its state for {} has the shape from before the model was attached"),
        ):
            if names:
                shown = names[0] + (f" (and {len(names) - 1} more)" if names[1:] else "")
                raise ValueError(f"optimizers: the optimizer given {why.format(shown)}; {_WAY_OUT}.")
        left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if left:
            logger.warning(
                "the optimizer given does not hold %s%s: it would train otherwise, and stays as it is.",
                left[0],
                f" (and {len(left) - 1} more)" if left[1:] else "",
            )
