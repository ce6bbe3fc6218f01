"""The backends, registered with transformers under names of their own when a model is first attached.

    attention=     on sdpa               on eager
    dense          voco_sdpa             voco_eager              one N × N mask (:mod:`.interface`)
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

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from .flash import run_flash
from .flex import flex_forward, flex_mask
from .interface import by_segments, eager_forward, with_rule

logger = logging.getLogger(__name__)

KERNELS: dict[str, tuple[Callable, Callable]] = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    "eager": (eager_forward, eager_mask),
}
"""transformers' attention and mask functions of the backbone's implementation."""


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
            "segmented": by_segments(forward, stock, additive=kernel == "eager", always=True),
            "auto": by_segments(forward, stock, additive=kernel == "eager", always=False),
        }
        for attention, (mask, function) in pairs.items():
            AttentionMaskInterface.register(NAMES[attention, kernel], mask)
            AttentionInterface.register(NAMES[attention, kernel], function)
    mask, function = by_segments(*KERNELS["sdpa"], additive=False, always=True, run=run_flash)
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
