"""Matryoshka pooling (M3: Cai et al., 2024): coarse to fine means of the features, no weights of its own.

One model is trained on several K at once (``num_tokens_range``), so that the LLM reads every granularity.
"""

from __future__ import annotations

import torch

from .base import Compressor, regions


class Matryoshka(Compressor):
    """``pool(V)``: K regions; a coarser grid is the mean of a finer one where one divides the other."""

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        return regions(vision, len(rows))
