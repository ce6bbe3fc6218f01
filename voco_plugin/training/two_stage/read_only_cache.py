"""Placed blocks that a training forward reads and never writes.

transformers' own cache is written to by each layer that runs. A layer that runs again, to be recomputed in a
backward pass, would then find its tokens there twice. Here every layer gets the blocks and its own tokens
behind them, however often it asks.

Shapes: ``B`` rows, ``H`` key-value heads, ``P`` cached slots, ``T`` text tokens, ``D`` head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...core.kv_cache import CacheState


class HeldLayer(DynamicLayer):
    """One layer of ``(B, H, P, D)`` that stays as it is."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B, H, T, D)`` each → ``(B, H, P + T, D)``, in the dtype (autocast's) and place given."""
        assert self.keys is not None and self.values is not None
        return (
            torch.cat([self.keys.to(key_states), key_states], dim=-2),
            torch.cat([self.values.to(value_states), value_states], dim=-2),
        )


def held(past: DynamicCache) -> DynamicCache:
    """``past`` with layers that are read only; what is known of its slots goes with it."""
    found = DynamicCache()
    for layer in past.layers:
        one = HeldLayer()
        one.lazy_initialization(layer.keys, layer.values)
        one.keys, one.values = layer.keys, layer.values
        found.layers.append(one)
    state = CacheState.of(past)
    if state is not None:
        state.put_on(found)
    return found
