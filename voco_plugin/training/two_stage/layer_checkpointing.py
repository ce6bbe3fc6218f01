"""Gradient checkpointing of decoder layers that are given a KV cache.

transformers takes the cache away from a layer that it checkpoints, because most caches are written to when
the layer is recomputed. Stage 1 and stage 2 need it: the keys of the VoCo tokens are what the one leaves to
the other. So stage 2's layers, whose cache is read only (``read_only_cache.py``), are checkpointed here,
where the model has checkpointing on, and those of stage 1 are recomputed a chunk at a time: with checkpoints
nested in the chunk's, memory grew with the number of chunks (``docs/video_training.md``); what held it was
not traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ...core.extension import Extension, extend
from ...core.forward import running_forward


class CheckpointedWithCache(Extension):
    """What a checkpointing layer is extended by: in stage 1 it runs as it is, in a stage 2 that says so it is
    checkpointed with its cache; in any other forward it does what transformers has it do.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = running_forward()
        if running is None or not self.gradient_checkpointing:  # type: ignore[attr-defined]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if running.mode.stage_one:
            return nn.Module.__call__(self, *args, **kwargs)  # type: ignore[arg-type]
        if running.mode.checkpoint_cached_layers and self.training and torch.is_grad_enabled():  # type: ignore
            return checkpoint(nn.Module.__call__, self, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


def can_checkpoint_with_cache(model: nn.Module) -> None:
    """Extend the layers of ``model`` that transformers would checkpoint."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            extend(module, CheckpointedWithCache)
