"""Q-Former (BLIP-2: Li et al., 2023): learned queries that cross-attend to the image features."""

from __future__ import annotations

import torch
from torch import nn

from .base import Compressor


class QFormer(Compressor):
    """transformers' ``Blip2QFormerModel`` with K queries, and a linear layer to the LLM's width (paper, Sec.
    3.5: "the architecture in [25]", the query number set to the compressed tokens).

    BLIP-2 gives it the vision tower's features; here it gets them as the LLM would, behind the projector,
    which is the same place in every family.

    Args:
        layers: of the Q-Former. BLIP-2's: 12.
        hidden_size: its width. BLIP-2's: 768.
        heads: of its attention; by default one per 64 channels, as BLIP-2's.
        cross_attention_frequency: every how many layers read the image. BLIP-2's: 2.
    """

    def __init__(
        self,
        width: int,
        num_tokens: int,
        layers: int = 12,
        hidden_size: int = 768,
        heads: int | None = None,
        cross_attention_frequency: int = 2,
    ) -> None:
        super().__init__(width, num_tokens)
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        config = Blip2QFormerConfig(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads or max(1, hidden_size // 64),
            intermediate_size=4 * hidden_size,
            encoder_hidden_size=width,
            cross_attention_frequency=cross_attention_frequency,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            use_qformer_text_input=False,
        )
        self.queries = nn.Parameter(torch.randn(1, num_tokens, hidden_size) * config.initializer_range)
        self.qformer = Blip2QFormerModel(config)
        self.linear = nn.Linear(hidden_size, width)

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        self.at_most(len(rows))
        queries = self.queries[:, : len(rows)].expand(len(vision), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=vision, return_dict=True)
        return self.linear(read.last_hidden_state)
