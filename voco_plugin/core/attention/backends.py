"""The backends, registered with transformers under names of their own when a model is first attached.

    attention=     on sdpa               on eager
    dense          voco_sdpa             voco_eager              one N × N mask (:mod:`.dense`)
    segmented      voco_segmented_sdpa   voco_segmented_eager    calls without a mask (:mod:`.segmented`)
    auto           voco_auto_sdpa        voco_auto_eager         of the two, forward by forward
    flex           voco_flex             voco_flex               FlexAttention, a block mask (:mod:`.flex`)
    flash          voco_flash            voco_flash              one variable-length call (:mod:`.flash`)

Each is a pair: a mask function, which sees the whole batch once a forward and says what the layers get as
their mask, and an attention function, which each layer calls with it. Stock names are untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from .context import active_rule
from .dense import eager_forward, with_rule
from .flash import run_flash
from .flex import flex_forward, flex_mask
from .segmented import run_plan
from .segments import SegmentMask, plan_segments

logger = logging.getLogger(__name__)

KERNELS: dict[str, tuple[Callable, Callable]] = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (eager_forward, eager_mask),
}
"""transformers' attention and mask functions of the backbone's implementation."""

SEGMENTED_FROM = 768
"""Tokens of a row from which ``auto`` cuts into segments (``voco bench attention``, docs/performance.md)."""

_chosen: set[str] = set()


def _by_segments(kernel: str, always: bool, run: Callable | None = None) -> tuple[Callable, Callable]:
    """The pair that gives the layers a :class:`SegmentMask` where a forward has no past.

    Args:
        run: what runs a plan, ``run(plan, module, query, key, value, **kwargs)``; ``None``: the kernel,
            segment by segment.
    """
    forward, stock = KERNELS[kernel]
    dense = with_rule(stock)
    additive = kernel == "eager"

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
        if active is not None and alone and active.in_slot_order and active.prefix is None:
            if always or _pays(q_length):
                active.masks_built += 1
                table = active.table.to(kwargs.get("device", "cpu"))
                dtype = kwargs.get("dtype", torch.float32)
                plan = plan_segments(active.config, table, mask_function, dtype)
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


def _names() -> dict[tuple[str, str], str]:
    names = {}
    for kernel in KERNELS:
        names["dense", kernel] = f"voco_{kernel}"
        names["segmented", kernel] = f"voco_segmented_{kernel}"
        names["auto", kernel] = f"voco_auto_{kernel}"
        names["flex", kernel] = "voco_flex"
        names["flash", kernel] = "voco_flash"
    return names


NAMES = _names()
"""``(attention, the backbone's implementation)`` → the registered name."""


def register() -> None:
    """Make the backends known to transformers (idempotent)."""
    for kernel, (forward, stock) in KERNELS.items():
        pairs = {
            "dense": (with_rule(stock), forward),
            "segmented": _by_segments(kernel, always=True),
            "auto": _by_segments(kernel, always=False),
        }
        for attention, (mask, function) in pairs.items():
            AttentionMaskInterface.register(NAMES[attention, kernel], mask)
            AttentionInterface.register(NAMES[attention, kernel], function)
    mask, function = _by_segments("sdpa", always=True, run=run_flash)
    for name, pair in {"voco_flex": (flex_mask, flex_forward), "voco_flash": (mask, function)}.items():
        AttentionMaskInterface.register(name, pair[0])
        AttentionInterface.register(name, pair[1])


def backend_for(implementation: str | None, attention: str = "auto") -> str:
    """The registered name for a backbone's attention implementation.

    Args:
        implementation: ``sdpa`` or ``eager``; a name registered here stays.
        attention: ``VoCoConfig.attention``.

    Raises:
        ValueError: the implementation cannot take the rule (FlashAttention would silently drop it).
    """
    if implementation in NAMES.values():
        return str(implementation)
    name = NAMES.get((attention, implementation or "sdpa"))
    if name is None:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot honour the isolation rule (it drops dense "
            "masks); load the language model with attn_implementation='sdpa' or 'eager'."
        )
    return name
