"""Gradient checkpointing of decoder layers that are given a KV cache.

transformers takes the cache away from a layer that it checkpoints, because most caches are written to when
the layer is recomputed. Stage 1 and stage 2 need it: the keys of the VoCo tokens are what the one leaves to
the other. So stage 2's layers, whose cache is read only (``read_only_cache.py``), are checkpointed here,
where the model has checkpointing on, and those of stage 1 are recomputed a chunk at a time: with checkpoints
nested in the chunk's, memory grew with the number of chunks (``docs/video_training.md``); what held it was
not traced.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ...core.adapter_stages import carried
from ...core.extension import Extension, extend
from ...core.forward import running_forward

_AS_IT_IS: ContextVar[bool] = ContextVar("voco_layer_as_it_is", default=False)


class CheckpointedWithCache(Extension):
    """What a checkpointing layer is extended by: in stage 1 it runs as it is, in a stage 2 that says so it is
    checkpointed with its cache; in any other forward it does what transformers has it do.
    """

    keeps_its_cache = True

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' flag, off while the layer runs as it is (also when a backward pass runs it again)."""
        return bool(vars(self).get("gradient_checkpointing", False)) and not _AS_IT_IS.get()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        vars(self)["gradient_checkpointing"] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = running_forward()
        if running is None or not self.gradient_checkpointing:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if running.mode.stage_one:
            return self._as_it_is(*args, **kwargs)
        if running.mode.checkpoint_cached_layers and self.training and torch.is_grad_enabled():  # type: ignore
            return checkpoint(carried(self._as_it_is), *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _as_it_is(self, *args: Any, **kwargs: Any) -> Any:
        before = _AS_IT_IS.set(True)
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            _AS_IT_IS.reset(before)


def can_checkpoint_with_cache(model: nn.Module) -> None:
    """Extend the layers of ``model`` that transformers would checkpoint."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            extend(module, CheckpointedWithCache)
