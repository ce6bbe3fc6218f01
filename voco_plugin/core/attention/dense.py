"""The dense backend: the backbone's own mask and the isolation rule, on the backbone's own eager or sdpa
kernel.

The mask functions take the mask function that transformers composed for the layer (causal, padding,
sliding window, bidirectional image blocks, packing) and intersect it with the rule: nothing of the backbone's
mask is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import and_masks, causal_mask_function, or_masks

from ..masks import isolation_predicate
from .context import active_rule


def eager_forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The eager attention of the module's own modeling file (softcaps and sinks differ from family to
    family).
    """
    source = sys.modules[type(module).__module__]
    forward = getattr(source, "eager_attention_forward", None)
    if forward is None:
        raise ValueError(
            f"{type(module).__name__} has no eager attention of its own; load the model with sdpa."
        )
    return forward(module, *args, **kwargs)


def _mapped(mask_function: Callable, order: torch.Tensor) -> Callable:
    """``mask_function`` on sequence indices instead of cache slots (a cached block's slots come first)."""

    def mapped(b, h, q, k):
        return mask_function(b, h, order[b, q], order[b, k])

    return mapped


def _both_ways(prefix: torch.Tensor) -> Callable:
    def both(b, h, q, k):
        return prefix[b, q] & prefix[b, k]

    return both


def with_rule(stock: Callable) -> Callable:
    """transformers' mask function ``stock``, intersected with the rule in force."""

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable = causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        active = active_rule()
        if active is not None:
            active.masks_built += 1
            device = kwargs.get("device", "cpu")
            table = active.table.to(device).pad_to(kv_length + kv_offset)
            if not active.in_slot_order:
                mask_function = _mapped(mask_function, table.order)
            if active.prefix is not None:
                mask_function = or_masks(mask_function, _both_ways(active.prefix.to(device)))
            mask_function = and_masks(mask_function, isolation_predicate(active.config, table))
            kwargs["allow_is_causal_skip"] = False
            kwargs["allow_is_bidirectional_skip"] = False
        return stock(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )

    return mask
