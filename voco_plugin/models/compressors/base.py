"""The base of all compressors, and the regions that several of them pool.

Shapes: ``G`` blocks of one size, ``n`` vision tokens (image features) of each, ``k`` tokens they become,
``D`` width of the language model, ``q`` question tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class Compressor(nn.Module):
    """Makes the input embeddings of a block's K tokens.

    Attributes:
        reads_question: whether it looks at the question first; what it makes then holds for that question
            only, and cannot be cached for others.
        reads_pixels: whether it looks at the image itself: ``vision`` is then what its own ``features`` makes
            of the pixels.

    A subclass takes ``(width, num_tokens, **options)``: D, the K of the config, and
    ``VoCoConfig.compressor_options``.
    """

    reads_question = False
    reads_pixels = False

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.width, self.num_tokens = width, num_tokens

    def forward(
        self, vision: torch.Tensor, rows: torch.Tensor, question: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The embeddings of the blocks' tokens.

        Args:
            vision: ``(G, n, D)``, the image features as the language model gets them.
            rows: ``(k, D)``, the VoCo token's embedding, k times.
            question: ``G`` tensors ``(q, D)``, the embeddings of each block's question; given only where
                ``reads_question``.

        Returns:
            ``(G, k, D)``.
        """
        raise NotImplementedError

    def check_model(self, model: Any) -> None:
        """Refuse a model that it cannot work in; called when it is attached."""

    def features(self, model: Any, pixels: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """Where ``reads_pixels``: what ``forward`` gets for ``vision``, ``(G, …, D)``.

        Args:
            pixels: of each block's image, ``(G, C, S, S)``.
            n: the vision tokens of a block.
            k: the tokens that are made of it.
        """
        raise NotImplementedError

    def at_most(self, k: int) -> None:
        """Refuse more tokens than there are slots for."""
        if k > self.num_tokens:
            raise ValueError(
                f"{k} VoCo tokens a block, and this model was made for num_tokens={self.num_tokens}; ask for "
                f"{self.num_tokens} or fewer."
            )


def regions(vision: torch.Tensor, k: int) -> torch.Tensor:
    """The means of ``k`` regions of the image, ``(G, n, D)`` → ``(G, k, D)``.

    Where n and k are both squares the regions are the cells of a √k × √k grid laid over the √n × √n patches
    (adaptive pooling, as LLaMA-VID's content tokens); else they are k runs of the tokens as they come.
    """
    count, n, width = vision.shape
    side, cells = math.isqrt(n), math.isqrt(k)
    channels = vision.transpose(1, 2)
    if side * side == n and cells * cells == k:
        grid = channels.reshape(count, width, side, side)
        return nn.functional.adaptive_avg_pool2d(grid, cells).flatten(2).transpose(1, 2)
    return nn.functional.adaptive_avg_pool1d(channels, k).transpose(1, 2)


def identity_linear(width: int) -> nn.Linear:
    """A linear layer that starts as the identity: image features are in the LLM's space already."""
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
