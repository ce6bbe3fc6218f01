"""An engine's answer → the text of one choice, piece by piece, with the log-probabilities of its tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engines.request import Answer, EngineError, Step
from .front import Front
from .request_record import RequestRecord
from .stop_strings import StopStrings
from .text_pieces import TextPieces

_LOWEST = -9999.0
"""JSON has no minus infinity; OpenAI writes this."""


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer. ``alternatives``: the likeliest in its place, likeliest first."""

    text: str
    data: bytes
    logprob: float
    alternatives: tuple[tuple[str, bytes, float], ...]
    offset: int


@dataclass(frozen=True)
class Delta:
    """What has come of a choice. ``finish_reason`` is in its last one, and there alone."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass
class Choice:
    """One of the answers of a request.

    Attributes:
        answer: the engine's.
        with_logprobs: whether they are asked for.
        tokens: that have come.
    """

    front: Front
    record: RequestRecord
    index: int
    answer: Answer
    stops: Sequence[str] = ()
    with_logprobs: bool = False
    tokens: int = 0
    _waiting: list[TokenLogprob] = field(default_factory=list)
    _out: int = 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Its text as it comes. Left early, the engine's answer ends too.

        Raises:
            EngineError: the engine failed, or ended the answer by itself.
        """
        pieces, stops = TextPieces(self.front.tokenizer), StopStrings(self.stops)
        read = 0
        try:
            async for step in self.answer:
                self._count()
                if self.with_logprobs and not self.front.token_bytes.is_special(step.token):
                    self._waiting.append(self._named(step, read))
                piece = pieces.feed(step.token)
                read += len(piece)
                text = stops.feed(piece)
                if stops.stopped:
                    yield self._last(text, "stop", cut=True)
                    return
                logprobs = self._settled(len(text))
                if text or logprobs:
                    yield Delta(self.index, text, logprobs)
            text = stops.feed(pieces.rest())
            reason = "stop" if stops.stopped else self.answer.finish_reason
            if reason not in ("stop", "length"):
                raise EngineError(f"it ended this answer ({reason}); send the request again.")
            yield self._last(text + stops.rest(), reason, cut=stops.stopped)
        finally:
            self.answer.cancel()

    def _count(self) -> None:
        self.tokens += 1
        self.record.completion_tokens += 1
        if self.record.first_token_seconds is None:
            self.record.first_token_seconds = self.record.seconds
            self.front.metrics.first_token.observe(self.record.first_token_seconds)
        if self.tokens == 1 and self.answer.queued_seconds is not None:
            self.front.metrics.queued.observe(self.answer.queued_seconds)

    def _settled(self, length: int) -> tuple[TokenLogprob, ...]:
        """The tokens whose text begins within what has gone out."""
        self._out += length
        ready = [one for one in self._waiting if one.offset < self._out]
        self._waiting = self._waiting[len(ready) :]
        return tuple(ready)

    def _last(self, text: str, reason: str, cut: bool) -> Delta:
        """Where a stop string cut, tokens that begin behind the cut are left out."""
        logprobs = self._settled(len(text))
        if not cut:
            logprobs += tuple(self._waiting)
        self._waiting = []
        return Delta(self.index, text, logprobs, reason)

    def _named(self, step: Step, offset: int) -> TokenLogprob:
        if step.logprob is None:
            raise EngineError("it gave no log-probability where one was asked for.")
        name = self.front.token_bytes
        alternatives = tuple((*name(token), max(value, _LOWEST)) for token, value in step.alternatives)
        return TokenLogprob(*name(step.token), max(step.logprob, _LOWEST), alternatives, offset)


async def merged(choices: Sequence[Choice]) -> AsyncGenerator[Delta, None]:
    """The deltas of all choices, each as it comes. What fails in one ends them all."""
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def follow(choice: Choice) -> None:
        try:
            async with contextlib.aclosing(choice.deltas()) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as problem:
            queue.put_nowait(problem)

    tasks = [asyncio.ensure_future(follow(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            event = await queue.get()
            if event is None:
                left -= 1
            elif isinstance(event, Exception):
                raise event
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["Choice", "Delta", "TokenLogprob", "merged"]
