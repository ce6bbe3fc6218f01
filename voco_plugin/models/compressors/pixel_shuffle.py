"""Pixel shuffle (InternVL's): neighbouring features side by side in the channels, then an MLP."""

from __future__ import annotations

import math

import torch
from torch import nn

from .base import Compressor


def shuffle(vision: torch.Tensor, k: int) -> torch.Tensor:
    """``(G, n, D)`` → ``(G, k, (n / k)·D)``: squares of patches where n and k are square grids that divide
    each other, else runs of the tokens as they come.

    Raises:
        ValueError: ``k`` does not divide ``n``.
    """
    count, n, width = vision.shape
    if n % k:
        raise ValueError(f"pixel_shuffle cannot turn {n} vision tokens into {k}: {k} does not divide {n}.")
    side, cells = math.isqrt(n), math.isqrt(k)
    if side * side == n and cells * cells == k and side % cells == 0:
        step = side // cells
        grid = vision.view(count, cells, step, cells, step, width)
        return grid.permute(0, 1, 3, 2, 4, 5).reshape(count, k, -1)
    return vision.reshape(count, k, -1)


class PixelShuffle(Compressor):
    """``MLP(shuffle(V))``.

    Args:
        num_vision: n, the vision tokens of every image (the MLP's width depends on it).
    """

    def __init__(self, width: int, num_tokens: int, num_vision: int | None = None) -> None:
        super().__init__(width, num_tokens)
        if not isinstance(num_vision, int) or num_vision % num_tokens or num_vision < num_tokens:
            raise ValueError(
                "compressor 'pixel_shuffle' needs compressor_options={'num_vision': n}, the vision tokens of "
                f"an image, which num_tokens={num_tokens} must divide; num_vision is {num_vision!r}."
            )
        self.num_vision = num_vision
        inside = num_vision // num_tokens * width
        self.mlp = nn.Sequential(
            nn.LayerNorm(inside), nn.Linear(inside, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        if vision.shape[1] != self.num_vision or len(rows) != self.num_tokens:
            raise ValueError(
                f"pixel_shuffle was made for {self.num_vision} vision tokens → {self.num_tokens}, not for "
                f"{vision.shape[1]} → {len(rows)}; use another compressor for images of several sizes."
            )
        return self.mlp(shuffle(vision, len(rows)))
