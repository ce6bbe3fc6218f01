"""The rule in force during one forward of the backbone.

It is set below the LM head, around the backbone's forward, and read where transformers builds the mask:
whoever calls the backbone (a fused loss, PEFT, accelerate) gets the same mask.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass

import torch

from ...config import VoCoConfig
from ..masks import TokenTable


@dataclass
class ActiveRule:
    """The rule and the table of every key slot of this forward, past ones included.

    Attributes:
        in_slot_order: whether slots stand in sequence order, so that indices need no mapping.
        prefix: ``(B, L)`` bool, slots that see each other both ways (a prefix-LM's prompt in stage 2, where
            the backbone itself no longer says so), or ``None``.
        masks_built: how many masks were made under it; none means that the backbone went around it.
    """

    config: VoCoConfig
    table: TokenTable
    in_slot_order: bool = True
    prefix: torch.Tensor | None = None
    masks_built: int = 0


_ACTIVE: ContextVar[ActiveRule | None] = ContextVar("voco_active_rule", default=None)


def active_rule() -> ActiveRule | None:
    """The rule in force, or ``None`` outside a forward that holds VoCo blocks."""
    return _ACTIVE.get()


def activate(rule: ActiveRule | None) -> Token:
    """Put ``rule`` in force; give the token back to :func:`deactivate`."""
    return _ACTIVE.set(rule)


def deactivate(token: Token) -> None:
    """Restore what was in force before."""
    _ACTIVE.reset(token)
