"""A KV cache for stage 1 that keeps the VoCo tokens' keys and values only.

A layer's attention gets the keys and values of the whole block; what stays after it is the last ``K`` slots.
The vision tokens' keys of one layer are thus gone before the next layer makes its own.

Shapes: ``B`` blocks, ``H`` key-value heads, ``N`` tokens of a block, ``K`` VoCo tokens, ``D`` head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class LastSlots(DynamicLayer):
    """One layer: ``update`` gives back what it is given, ``(B, H, N, D)``, and stores ``(B, H, K, D)``.

    Args:
        replayed: whether the layer may run again, to be recomputed in a backward pass; what it stored first
            stays.
    """

    def __init__(self, keep: int, replayed: bool = False) -> None:
        super().__init__()
        self.keep, self.replayed = keep, replayed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized and self.replayed:
            return key_states, value_states
        if self.is_initialized:
            raise RuntimeError("stage 1 runs a block in one forward; this layer was given keys twice.")
        self.lazy_initialization(key_states, value_states)
        self.keys = key_states[..., -self.keep :, :].clone()
        self.values = value_states[..., -self.keep :, :].clone()
        return key_states, value_states


class LastSlotsCache(DynamicCache):
    """Layers of :class:`LastSlots`, made as the model asks for them."""

    def __init__(self, keep: int, replayed: bool = False) -> None:
        super().__init__()
        self.keep, self.replayed = keep, replayed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(LastSlots(self.keep, self.replayed))
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
