"""Divergences of whole logits, as written in a textbook."""

from __future__ import annotations

import torch


def plain(s: torch.Tensor, t: torch.Tensor, kind: str = "forward", temperature: float = 1.0) -> torch.Tensor:
    """The reference: whole logits ``(n, V)`` → ``(n,)``, as written in a textbook."""
    p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
    if kind == "forward":
        return (p * (p.log() - q.log())).sum(-1)
    if kind == "reverse":
        return (q * (q.log() - p.log())).sum(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
