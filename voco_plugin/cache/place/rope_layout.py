"""The ways in which backbones lay out a rotary key: each turns ``(1, H, K, D)`` by an angle given as cos and
sin.

``R`` rotated channels may be fewer than ``D`` (partial rotary): only the first ``R`` turn, unless the
backbone's own function says otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _own(apply: Callable) -> Turn:
    """The backbone's own ``apply_rotary_pos_emb``."""

    def turn(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return apply(key, key, cos, sin)[1]

    return turn


def halves(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Channel ``i`` pairs with ``i + R/2`` (GPT-NeoX, Llama)."""
    width = cos.shape[-1]
    turned, rest = key[..., :width], key[..., width:]
    half = width // 2
    other = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    return torch.cat((turned * cos[:, None] + other * sin[:, None], rest), dim=-1)


def pairs(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Channel ``2i`` pairs with ``2i + 1`` (GPT-J); cos and sin of ``R/2`` angles, each followed by its
    copy.
    """
    half = cos.shape[-1] // 2
    return complex_pairs(key, cos[..., :half], sin[..., :half])


def complex_pairs(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Channel ``2i`` pairs with ``2i + 1``, as one complex number; cos and sin of ``R/2`` angles."""
    width = 2 * cos.shape[-1]
    turned, rest = key[..., :width], key[..., width:]
    even, odd = turned[..., 0::2], turned[..., 1::2]
    c, s = cos[:, None], sin[:, None]
    mixed = torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)
    return torch.cat((mixed, rest), dim=-1)


@functools.cache
def turns(module: ModuleType) -> list[Turn]:
    """The candidates for a backbone whose text model lives in ``module``, its own function first. The same
    objects each time: layers that turn alike are told by them.
    """
    apply = getattr(module, "apply_rotary_pos_emb", None)
    return [*([] if apply is None else [_own(apply)]), halves, pairs, complex_pairs]
