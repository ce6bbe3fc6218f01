"""LLaMA-VID (Li et al., 2023; paper, Table 3): one context token that reads the question, and content tokens.

    context    Linear(mean over the question's tokens of softmax(Q·Xᵀ/√D)·X)    Q: the question, X: the image
    content    Linear(pool(X)), K − 1 of them

LLaMA-VID takes Q from a text decoder of its own; here Q is a linear map of the question's embeddings, which
the language model has already. The tokens depend on the question, so they cannot be cached for another.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .base import Compressor, identity_linear, regions


class LlamaVid(Compressor):
    """Context and content tokens; ``num_tokens`` is both together, at least 2."""

    reads_question = True

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__(width, num_tokens)
        if num_tokens < 2:
            raise ValueError(
                f"compressor 'llama_vid' makes one context token and at least one content token; num_tokens="
                f"{num_tokens} must be at least 2."
            )
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.context, self.content = identity_linear(width), identity_linear(width)

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        if question is None or len(rows) < 2:
            raise ValueError("llama_vid needs a question and at least 2 tokens a block.")
        content = self.content(regions(vision, len(rows) - 1))
        keys = self.key(vision)
        found = []
        for image, key, asked in zip(vision, keys, question, strict=True):
            if not len(asked):
                raise ValueError(
                    "llama_vid reads the question behind the image, and there is none; in training the "
                    "labels must leave it out (assistant_only_loss or completion_only_loss)."
                )
            likeness = self.query(asked) @ key.transpose(0, 1) / math.sqrt(self.width)
            found.append((likeness.softmax(dim=-1) @ image).mean(dim=0, keepdim=True))
        return torch.cat([self.context(torch.stack(found)), content], dim=1)
