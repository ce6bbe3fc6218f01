"""Placed blocks that a training forward reads and never writes.

transformers' own cache is written to by each layer that runs. A layer that runs again, to be recomputed in a
backward pass, would then find its tokens there twice. Here every layer gets the blocks and its own tokens
behind them, however often it asks.

Shapes: ``B`` rows, ``H`` key-value heads, ``P`` cached slots, ``T`` text tokens, ``D`` head dim.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ...core.kv_cache import VoCoKVCache


class ReadOnlyLayer(DynamicLayer):
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


def read_only(past: VoCoKVCache) -> VoCoKVCache:
    """``past`` with layers that are read only; what is known of its slots goes with it."""
    found = copy.copy(past)
    found.layers = []
    for layer in past.layers:
        one = ReadOnlyLayer()
        one.lazy_initialization(layer.keys, layer.values)
        one.keys, one.values = layer.keys, layer.values
        found.layers.append(one)
    return found
