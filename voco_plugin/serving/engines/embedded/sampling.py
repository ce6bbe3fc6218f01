"""How each request's next token is drawn. Upstream knows one way for all; here a row is one request's.

It stands in upstream's list as a logits processor that leaves one token standing in each row: greedy search,
which upstream then does, takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from ..request import Sampling, Step


@dataclass
class Draws:
    """What one answer has drawn so far.

    Attributes:
        sampling: how.
        after_images: whether the prompt holds blocks, so that tokens that are input only are never given.
        send: called with each step.
        tokens: ids drawn.
    """

    sampling: Sampling
    after_images: bool
    send: Callable[[Step], Any]
    tokens: list[int] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()  # on the CPU: the same draws on every device
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed % (1 << 63))

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token is that of the largest logit, as it is."""
        s = self.sampling
        return not (s.temperature or s.logit_bias or s.presence_penalty or s.frequency_penalty)

    def draw(self, scores: torch.Tensor) -> int:
        """The next token, of its logits ``(vocab,)``, which are not changed."""
        s = self.sampling
        if s.logit_bias:
            at = torch.tensor(list(s.logit_bias), device=scores.device)
            bias = torch.tensor(list(s.logit_bias.values()), dtype=scores.dtype, device=scores.device)
            scores = scores.index_add(0, at, bias)
        if self.counts and (s.presence_penalty or s.frequency_penalty):
            at = torch.tensor(list(self.counts), device=scores.device)
            times = torch.tensor(list(self.counts.values()), dtype=scores.dtype, device=scores.device)
            scores = scores.index_add(0, at, -(s.presence_penalty + s.frequency_penalty * times))
        if s.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(_chances(scores, s).cpu(), 1, generator=self.generator))

    def take(self, token: int, logprobs: torch.Tensor | None) -> None:
        """Note and send the next token; ``logprobs`` ``(vocab,)`` where they are asked for."""
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if logprobs is None:
            self.send(Step(token))
            return
        top = logprobs.topk(min(self.sampling.logprobs or 0, logprobs.shape[-1]))
        likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self.send(Step(token, float(logprobs[token]), likeliest))


def _chances(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities ``(vocab,)``: temperature, then ``top_k``, then ``top_p``, in transformers' order."""
    scores = scores / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    chances = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = chances.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p, 0)
        ordered[0] = ordered[0].clamp_min(torch.finfo(ordered.dtype).tiny)
        chances = torch.zeros_like(chances).scatter(0, order, ordered)
    return chances


class PerRequestSampler(ContinuousBatchingLogitsProcessor):
    """Draws the next token of each row as its request wants it.

    Args:
        draws_of: a request's id → its :class:`Draws`; ``None`` for one that is gone.
        input_only: ids that no answer to an image gives (VoCo and image tokens).
        drawn: called when every row has its token.
    """

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(
        self,
        draws_of: Callable[[str], Draws | None],
        input_only: Sequence[int],
        drawn: Callable[[], Any],
    ) -> None:
        self.draws_of, self.input_only = draws_of, torch.tensor(sorted(input_only))
        self.drawn = drawn
        self._rows: list[Draws | None] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        self._rows = [self.draws_of(one.state.request_id) for one in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """``scores`` ``(rows, vocab)`` with one token standing in each row. Prompts that are read in pieces
        have rows too, after those of the requests that get a token; upstream does not read them.
        """
        if len(scores) < len(self._rows):
            raise RuntimeError(f"{len(scores)} rows of logits for {len(self._rows)} requests.")
        if not len(scores):
            return scores
        rows = [(row, draws) for row, draws in enumerate(self._rows) if draws is not None]
        wanted = [row for row, draws in rows if draws.sampling.logprobs is not None]
        logprobs = {row: torch.log_softmax(scores[row], -1) for row in wanted}
        seeing = torch.tensor([row for row, draws in rows if draws.after_images], device=scores.device)
        if len(seeing):
            scores[seeing.long()[:, None], self.input_only.to(scores.device)[None]] = float("-inf")
        tokens = scores.argmax(-1).tolist()
        for row, draws in rows:
            if not draws.takes_likeliest:
                tokens[row] = draws.draw(scores[row])
            draws.take(tokens[row], logprobs.get(row))
        self.drawn()
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


__all__ = ["Draws", "PerRequestSampler"]
