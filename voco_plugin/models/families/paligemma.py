"""PaliGemma and PaliGemma 2: a prefix-LM, whose prompt is read both ways and whose answer is causal."""

from __future__ import annotations

import torch

from .base import Family


class PaliGemma(Family):
    """The processor marks the prompt with token type 0.

    In one pass the backbone itself lets the prompt see both ways (the rule still hides what it hides, so a
    text token before an image sees that image's VoCo tokens, and a vision token its own block's). In stage 2
    it no longer does, since its cache is not empty: the rule then says so. The backbone counts positions from
    1 and the rule from 0, which is the same to a relative encoding.
    """

    prefix_lm = True

    def prefix(self, token_types: torch.Tensor) -> torch.Tensor:
        return token_types == 0
