"""Gradient checkpointing of decoder layers that are given a KV cache.

transformers takes the cache away from a layer that it checkpoints, because most caches are written to when
the layer is recomputed. Stage 1 and stage 2 need it: the keys of the VoCo tokens are what the one leaves to
the other. Their caches bear a second run (``slots.py``, ``held.py``), so the layers are checkpointed here
instead, where the model has checkpointing on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextlib.contextmanager
def recomputing(text_model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, the layers of ``text_model`` that transformers would checkpoint are checkpointed with
    their caches. Nothing changes where checkpointing is off.
    """
    layers = [
        module
        for module in text_model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _Recomputed(layer)
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.gradient_checkpointing = True
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own


class _Recomputed:
    """``layer.forward`` under a checkpoint."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer, self.own = layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self._run(*args, **kwargs)
        return checkpoint(self._run, *args, use_reentrant=False, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # in the backward pass the flag is back on, and the layer would lose its cache
        before, self.layer.gradient_checkpointing = self.layer.gradient_checkpointing, False
        try:
            return self.own(*args, **kwargs)
        finally:
            self.layer.gradient_checkpointing = before
