"""VoCo tokens that start from what learned queries read off the image (``token_init="queries"``).

Shapes: ``G`` blocks of one size, ``n`` vision tokens of each, ``k`` VoCo tokens, ``D`` width of the language
model, ``S`` width of the attention here (``hidden_size``), ``H`` its heads, ``d = S / H``.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .base import Compressor

_CYCLES = (0.5, 16.0)
"""Waves across the image: half a one, up to one for every two patches of a side of 32."""


def positions(n: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Sinusoids of where each of ``n`` vision tokens stands, ``(n, size)``.

    A square ``n`` is a √n × √n grid in row order: half of the channels tell the row, half the column. Any
    other ``n`` (tiles, images that are not square) is a run: half of the channels tell how far along it a
    token stands, the other half nothing. Places are shares of the whole, so the weights fit any ``n``.
    """
    side = math.isqrt(n)
    square = side * side == n
    steps = side if square else n
    along = (torch.arange(steps, device=device) + 0.5) / steps
    slow, fast = (math.log2(c) for c in _CYCLES)
    cycles = torch.logspace(slow, fast, steps=size // 4, base=2, device=device)
    angles = 2 * math.pi * along[:, None] * cycles
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side or n, size / 2)
    if square:
        return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=-1)
    return torch.cat([waves, torch.zeros_like(waves)], dim=-1)


class Queries(Compressor):
    """The row plus ``W · read(V)``: a query for each of the K tokens, of H heads, cross-attends to the image.

    Keys and values are linear maps of the LayerNormed image features plus their place, so a query can ask for
    a place, for a content, or both, where a mean knows neither. W starts at zero, so training starts as the
    paper's. Token i hangs on its own query alone: the first k of K tokens are what k tokens would be.

    Args:
        hidden_size: S, a multiple of 4 (two coordinates, sine and cosine) and of ``heads``. The 3 · D · S
            weights are about D² where D is some hundreds.
        heads: H.
    """

    def __init__(self, width: int, num_tokens: int, hidden_size: int = 256, heads: int = 8) -> None:
        super().__init__(width, num_tokens)
        for name, value in (("hidden_size", hidden_size), ("heads", heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"token_init='queries' needs compressor_options.{name} to be a whole number of at least "
                    f"1, not {value!r}."
                )
        if hidden_size % 4 or hidden_size % heads:
            raise ValueError(
                f"token_init='queries' needs a hidden_size that 4 and its heads divide; {hidden_size} with "
                f"{heads} heads is not one: change compressor_options."
            )
        # heads are part of the shape, so weights of other heads do not load as if they were these
        self.queries = nn.Parameter(torch.randn(num_tokens, heads, hidden_size // heads))
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, hidden_size, bias=False)
        self.value = nn.Linear(width, hidden_size, bias=False)
        self.seed = nn.Linear(hidden_size, width, bias=False)
        nn.init.zeros_(self.seed.weight)

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        k = len(rows)
        self.at_most(k)
        heads, size = self.queries.shape[1:]
        seen = self.norm(vision)
        place = positions(vision.shape[1], heads * size, vision.device).to(seen.dtype)
        keys, values = (
            (of(seen) + place).unflatten(-1, (heads, size)).transpose(1, 2) for of in (self.key, self.value)
        )  # (G, H, n, d)
        queries = self.queries[:k].transpose(0, 1).expand(len(vision), -1, -1, -1)  # (G, H, k, d)
        read = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return rows + self.seed(read.transpose(1, 2).flatten(2))
