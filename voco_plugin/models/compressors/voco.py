"""VoCo tokens: the language model itself compresses (paper, Sec. 3.2); what differs is how a token starts.

One more start is in ``queries.py``.
"""

from __future__ import annotations

import torch
from torch import nn

from .base import Compressor, regions


class VoCo(Compressor):
    """``token_init="learned"``: one trained row, the same for all K tokens (the paper's)."""

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        return rows.expand(len(vision), *rows.shape)


class Slots(Compressor):
    """``token_init="slots"``: a trained offset for each of the K slots on top of the shared row. The offsets
    start at zero, so training starts as the paper's."""

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__(width, num_tokens)
        self.offsets = nn.Parameter(torch.zeros(num_tokens, width))

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        self.at_most(len(rows))
        made = rows + self.offsets[: len(rows)].to(rows.dtype)
        return made.expand(len(vision), *rows.shape)


class Pooled(Compressor):
    """``token_init="pooled"``: the row plus ``W · pool(V)``, K regions pooled for K tokens.

    The token still reads the vision tokens through the LLM's own attention; it need not find the image from
    nothing.

    Args:
        start: what W ``(D, D)`` is before training: ``zero`` (training starts as the paper's) or
            ``identity`` (it starts where average pooling starts, the mean features themselves).
    """

    def __init__(self, width: int, num_tokens: int, start: str = "zero") -> None:
        super().__init__(width, num_tokens)
        if start not in ("zero", "identity"):
            raise ValueError(
                f"token_init='pooled' needs compressor_options.start to be zero or identity, not {start!r}."
            )
        self.seed = nn.Linear(width, width, bias=False)
        (nn.init.zeros_ if start == "zero" else nn.init.eye_)(self.seed.weight)

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        return rows + self.seed(regions(vision, len(rows)))
