"""The flash backend: the segments of a forward as one variable-length FlashAttention call. GPU only.

``flash-attn`` where it is installed (extra ``flash-attn``), else ``torch.nn.attention.varlen``. Both take
sequences laid end to end with their lengths, causal within each: exactly the plan's square segments. What is
no plain causal segment is refused by name, never computed otherwise.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .segmented import gathered
from .segments import SegmentPlan

DTYPES = (torch.float16, torch.bfloat16)
"""What the kernels compute in."""


def run_flash(
    plan: SegmentPlan, module: torch.nn.Module, query: torch.Tensor, *rest: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention by segments; arguments and result as :func:`~voco_plugin.core.attention.segmented.run_plan`.

    Raises:
        ValueError: no GPU, a dtype, a segment or an option that the kernel does not do.
    """
    _refuse_cpu(query)
    return by_lengths(varlen_kernel(), plan, module, query, *rest, **kwargs)


def _refuse_cpu(query: torch.Tensor) -> None:
    if query.device.type != "cuda":
        raise ValueError(
            f"attention='flash' needs a GPU, and the model is on {query.device.type}; use 'segmented'."
        )


def by_lengths(
    kernel: Callable,
    plan: SegmentPlan,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One call of ``kernel(q, k, v, lengths, longest, scale)`` on sequences laid end to end: q ``(T, H, D)``,
    k and v ``(T, H_kv, D)``, ``lengths`` their cumulative lengths ``(S + 1,)`` int32.
    """
    odd = next((g for g in plan.groups if g.mask is not None), None)
    if odd is not None:
        raise ValueError(
            f"attention='flash' runs plain causal segments, and {odd.count} of {odd.rows} rows and "
            f"{odd.keys} keys are not (a window shorter than a block, images read both ways, "
            "block_context='prefix', hide_prefix or rule='star'); use 'segmented'."
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"attention='flash' takes fp16 or bf16, not {query.dtype}; use 'segmented'.")
    for name, given in (
        ("dropout", dropout),
        ("softcap", kwargs.get("softcap")),
        ("sinks", kwargs.get("s_aux")),
    ):
        if given is not None and not (isinstance(given, float) and given == 0.0):
            raise ValueError(f"attention='flash' has no {name}; use 'segmented'.")
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"attention='flash' wants keys and values of one width, not {key.shape[-1]} and "
            f"{value.shape[-1]}; use 'segmented'."
        )
    counts = [group.rows for group in plan.groups for _ in range(group.count)]
    lengths = torch.tensor([0, *counts], device=query.device).cumsum(0).to(torch.int32)
    out = kernel(
        gathered(query, plan.rows), gathered(key, plan.keys), gathered(value, plan.keys), lengths,
        max(counts), scaling,
    )  # fmt: skip
    padded = torch.cat([out, out.new_zeros(1, *out.shape[1:])])
    return padded.index_select(0, plan.place).view(query.shape[0], query.shape[2], *out.shape[1:]), None


def varlen_kernel() -> Callable:
    """The variable-length kernel at hand, as ``kernel(q, k, v, lengths, longest, scale)``.

    Raises:
        ValueError: there is none.
    """
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        def flash(q, k, v, lengths, longest, scale):
            return flash_attn_varlen_func(
                q, k, v, lengths, lengths, longest, longest, softmax_scale=scale, causal=True
            )

        return flash
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        missing = {"varlen_attn"}
    else:  # torch 2.10 has it without these
        missing = {"scale", "window_size", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters)
    if missing:
        raise ValueError(
            "attention='flash' needs flash-attn (pip install 'voco_plugin[flash-attn]') or torch >= 2.12: "
            f"torch {torch.__version__}'s torch.nn.attention.varlen lacks {', '.join(sorted(missing))}; use "
            "'segmented'."
        )

    def varlen(q, k, v, lengths, longest, scale):
        grouped = q.shape[1] != k.shape[1]
        return varlen_attn(
            q, k, v, lengths, lengths, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped
        )

    return varlen
