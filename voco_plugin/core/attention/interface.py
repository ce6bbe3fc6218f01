"""What transformers calls in a forward: a mask function, which sees the whole batch once, and an attention
function, which each layer calls with what the mask function gave.

The mask functions take the mask function that transformers composed for the layer (causal, padding, sliding
window, bidirectional image blocks, packing) and intersect it with the rule: nothing of the backbone's mask is
replaced. One dense mask comes of it, on the backbone's own eager or sdpa kernel, or a plan of calls without a
mask (:mod:`.segments`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import and_masks, causal_mask_function, or_masks

from ..forward import active_rule
from ..masks import isolation_predicate
from .segmented import run_plan
from .segments import SegmentMask, plan_segments

logger = logging.getLogger(__name__)

SEGMENTED_FROM = 768
"""Tokens of a row from which ``auto`` cuts into segments (``voco bench attention``, docs/performance.md)."""

_chosen: set[str] = set()


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
            if not table.ordered:
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


def by_segments(
    forward: Callable, stock: Callable, *, additive: bool, always: bool, run: Callable | None = None
) -> tuple[Callable, Callable]:
    """The pair that gives the layers a :class:`SegmentMask` where a forward has no past.

    Args:
        forward, stock: transformers' attention and mask functions of the backbone's implementation.
        additive: whether that attention adds its mask (eager) and wants floats.
        always: whether any row is cut into segments; else those of at least :data:`SEGMENTED_FROM` tokens.
        run: what runs a plan, ``run(plan, module, query, key, value, **kwargs)``; ``None``: the kernel,
            segment by segment.
    """
    dense = with_rule(stock)

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
        # behind a past (decoding, stage 2) the rows are few and hide nothing worth cutting: one dense mask
        alone = q_length == kv_length and not int(q_offset) and not int(kv_offset)
        if active is not None and alone and active.table.ordered and active.prefix is None:
            if always or _pays(q_length):
                active.masks_built += 1
                dtype = kwargs.get("dtype", torch.float32)
                device = kwargs.get("device", "cpu")
                plan = plan_segments(active.config, active.table, mask_function, dtype, device)
                return SegmentMask.of(plan, batch_size, q_length)
        return dense(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )

    def attention(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if isinstance(attention_mask, SegmentMask) and run is not None:
            return run(attention_mask.plan, module, query, key, value, **kwargs)
        if isinstance(attention_mask, SegmentMask):
            return run_plan(attention_mask.plan, forward, additive, module, query, key, value, **kwargs)
        return forward(module, query, key, value, attention_mask, **kwargs)

    return mask, attention


def _pays(tokens: int) -> bool:
    choice = "segmented" if tokens >= SEGMENTED_FROM else "dense"
    if choice not in _chosen:
        _chosen.add(choice)
        logger.info(
            "attention='auto' runs %s from here: %s tokens a row, segments pay from %s on",
            choice, tokens, SEGMENTED_FROM,
        )  # fmt: skip
    return choice == "segmented"
