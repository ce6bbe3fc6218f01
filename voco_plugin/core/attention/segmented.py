"""The segmented backend: the plan's calls on the backbone's own kernel (sdpa or eager), forward and backward.

What the rule hides is not computed, nor is padding; no ``N × N`` mask exists. Each call goes through
transformers' attention function for that kernel, so grouped heads, softcaps and sinks are the backbone's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .segments import SegmentPlan


def run_plan(
    plan: SegmentPlan,
    kernel: Callable,
    additive: bool,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by segments.

    Args:
        kernel: transformers' attention function of the backbone's implementation.
        additive: whether it takes no mask but an additive one.
        query: ``(B, H, N, D)``; ``key``, ``value``: ``(B, H_kv, N, D)``.

    Returns:
        ``(B, N, H, D_v)`` as attention functions give it; zeros in rows of padding.
    """
    batch, _, tokens, _ = query.shape
    rows = gathered(query, plan.rows)
    keys = gathered(key, plan.keys)
    values = gathered(value, plan.keys)
    outputs = []
    row = column = 0
    for number, group in enumerate(plan.groups):
        n, m = group.count * group.rows, group.count * group.keys
        q = rows[row : row + n].unflatten(0, (group.count, group.rows)).transpose(1, 2)
        k, v = (
            x[column : column + m].unflatten(0, (group.count, group.keys)).transpose(1, 2)
            for x in (keys, values)
        )
        mask = plan.additive(number) if additive else group.mask
        out, _ = kernel(module, q, k, v, mask, **kwargs)
        outputs.append(out.flatten(0, 1))
        row, column = row + n, column + m
    width = outputs[0].shape[1:]
    outputs.append(outputs[0].new_zeros(1, *width))  # what padding gets
    flat = torch.cat(outputs).index_select(0, plan.place)
    return flat.view(batch, tokens, *width), None


def gathered(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``(B, H, N, D)`` → ``(len(index), H, D)``."""
    return tensor.transpose(1, 2).flatten(0, 1).index_select(0, index)
