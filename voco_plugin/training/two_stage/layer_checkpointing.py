"""Gradient checkpointing of decoder layers that are given a KV cache.

transformers takes the cache away from a layer that it checkpoints, because most caches are written to when
the layer is recomputed. Stage 1 and stage 2 need it: the keys of the VoCo tokens are what the one leaves to
the other. So stage 2's layers, whose cache is read only (``held.py``), are checkpointed here, where the model
has checkpointing on, and those of stage 1 are recomputed a chunk at a time.
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


@contextlib.contextmanager
def kept(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, no layer of ``model`` is checkpointed: what runs is recomputed as a whole. With
    checkpoints nested in the chunk's, memory grew with the number of chunks (``docs/video_training.md``);
    what held it was not traced.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


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
