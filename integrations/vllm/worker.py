"""The worker's side: writes blocks into the paged cache, layer by layer.

vLLM calls a connector in each layer after the layer's own keys and values are written and before its
attention: what is written then replaces them. Nothing is read from the store here.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from .scheduler import StepBlocks

_LAYER = re.compile(r"\.(\d+)\.")


class WorkerSide:
    """
    Args:
        layers: vLLM's attention layers by name.
        num_layers: L.
        dtype: of the paged cache.

    Raises:
        ValueError: the layers are not L in a row, or an attention backend writes its keys and values itself.
    """

    def __init__(self, layers: dict[str, Any], num_layers: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._index = {name: layer_index(name) for name in layers}
        if sorted(self._index.values()) != list(range(num_layers)):
            raise ValueError(
                f"vLLM has the attention layers {', '.join(sorted(layers)) or 'none'}, voco_engine.json says "
                f"{num_layers} layers; export the checkpoint again."
            )
        for name, layer in layers.items():
            backend = layer.get_attn_backend()
            if backend.forward_includes_kv_cache_update or not hasattr(layer.impl, "do_kv_cache_update"):
                raise ValueError(
                    f"the attention backend {backend.get_name()} of {name} writes keys and values inside its "
                    "attention, which would overwrite a block; choose another with --attention-backend."
                )
        self._slots: torch.Tensor | None = None
        self._data: torch.Tensor | None = None
        self._refused: set[str] = set()

    def bind(self, step: StepBlocks, device: torch.device) -> None:
        """What the coming forward writes."""
        self._refused |= step.refused
        if step.data is None or step.slots is None:
            self._slots = self._data = None
            return
        self._slots = step.slots.to(device, non_blocking=True)
        self._data = step.data.to(device, self.dtype, non_blocking=True)

    def write(self, name: str) -> None:
        """Overwrite the keys and values of layer ``name``."""
        if self._data is None:
            return
        layer = get_forward_context().no_compile_layers[name]
        keys, values = self._data[self._index[name]]
        layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, self._slots)

    def clear(self) -> None:
        """The forward is over."""
        self._slots = self._data = None

    def take_refused(self) -> set[str]:
        """Ids of requests to be failed, once."""
        refused, self._refused = self._refused, set()
        return refused


def layer_index(name: str) -> int:
    """``model.layers.7.self_attn.attn`` → 7."""
    found = _LAYER.findall(name)
    if len(found) != 1:
        raise ValueError(f"attention layer {name!r} does not tell its number.")
    return int(found[0])
