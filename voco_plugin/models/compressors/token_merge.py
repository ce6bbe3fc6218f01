"""Token merging (ToMe: Bolya et al., 2023): the most similar features are averaged until K are left.

Shapes: ``G`` blocks, ``n`` tokens of each, ``k`` that are left, ``D`` width.
"""

from __future__ import annotations

import torch
from torch import nn

from .base import Compressor, identity_linear


def merge(vision: torch.Tensor, k: int) -> torch.Tensor:
    """``(G, n, D)`` → ``(G, k, D)`` by rounds of bipartite soft matching (their Sec. 3).

    In a round every other token looks for the most similar of those between (cosine); the best-matching pairs
    merge, at most half of the tokens, weighted by how many features each stands for. Order is kept.

    Raises:
        ValueError: ``k`` is more than ``n``.
    """
    count, n, width = vision.shape
    if k > n:
        raise ValueError(f"{n} vision tokens cannot be merged to {k}; ask for {n} or fewer.")
    tokens, sizes = vision, vision.new_ones(count, n)
    while tokens.shape[1] > k:
        tokens, sizes = _round(tokens, sizes, min(tokens.shape[1] - k, tokens.shape[1] // 2))
    return tokens


def _round(tokens: torch.Tensor, sizes: torch.Tensor, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One round: ``pairs`` tokens at odd places are merged into their match at even places."""
    count, n, width = tokens.shape
    with torch.no_grad():  # which tokens merge is a choice; how they average has a gradient
        unit = nn.functional.normalize(tokens.float(), dim=-1)
        likeness, match = (unit[:, 1::2] @ unit[:, ::2].transpose(1, 2)).max(dim=-1)
        chosen = likeness.argsort(dim=-1, descending=True, stable=True)[:, :pairs]
        gone = torch.zeros(count, n, dtype=torch.bool, device=tokens.device).scatter(1, 2 * chosen + 1, True)
        into = torch.arange(n, device=tokens.device).repeat(count, 1)
        into.scatter_(1, 2 * chosen + 1, 2 * match.gather(1, chosen))
    sums = torch.zeros_like(tokens).scatter_add(
        1, into[..., None].expand_as(tokens), tokens * sizes[..., None]
    )
    total = torch.zeros_like(sizes).scatter_add(1, into, sizes)
    merged = sums[~gone].view(count, n - pairs, width)
    left = total[~gone].view(count, n - pairs)
    return merged / left[..., None], left


class TokenMerge(Compressor):
    """``Linear(merge(V))``."""

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__(width, num_tokens)
        self.linear = identity_linear(width)

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        return self.linear(merge(vision, len(rows)))
