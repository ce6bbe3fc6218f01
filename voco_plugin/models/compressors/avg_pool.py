"""Average pooling and a linear layer (paper, Sec. 3.5: the single content token of LLaMA-VID)."""

from __future__ import annotations

import torch

from .base import Compressor, identity_linear, regions


class AveragePool(Compressor):
    """``Linear(pool(V))``: K regions of the image, each the mean of its features."""

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__(width, num_tokens)
        self.linear = identity_linear(width)

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        return self.linear(regions(vision, len(rows)))
