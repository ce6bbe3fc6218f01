"""What passes between a front and an engine: token ids and blocks in, tokens out as they come.

    request = EngineRequest(ids, blocks, keys, Sampling(max_new_tokens=64))
    engine.check(request)                    # what this engine cannot do, before anything runs
    answer = engine.submit(request)
    async for step in answer: ...            # step.token, step.logprob, step.alternatives
    answer.finish_reason                     # "stop" or "length"

Leaving an answer early is ``answer.cancel()``; the engine then frees what it holds of it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...cache import VoCoCache


class RequestError(ValueError):
    """A request that cannot be answered as it is; the message is for who sent it.

    Attributes:
        param: the field at fault, as the OpenAI API calls it, or ``None``.
        code: a word for programs (``context_length_exceeded`` …), or ``None``.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class EngineError(RuntimeError):
    """The engine failed under a request; the message says how. Sent again, the request may be answered."""


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn.

    Attributes:
        max_new_tokens: tokens at most, 1 or more.
        temperature: 0 is greedy.
        top_p: mass of the likeliest tokens that are drawn from; 1: all.
        top_k: how many of the likeliest tokens are drawn from; 0: all.
        seed: the same seed gives the same draws; ``None``: another each time.
        presence_penalty: taken off the logit of every token that this answer holds already.
        frequency_penalty: the same, times how often it holds it.
        logit_bias: added to logits, by token id.
        logprobs: ``None``: none; ``n``: the log-probability of each token and those of the ``n`` likeliest,
            of the model's own logits (before bias, penalties and temperature).
        stop_ids: ids that end the answer, the model's own left out; the id is part of the answer.
        ignore_eos: the model's own end tokens do not end it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class EngineRequest:
    """One prompt and how it is answered.

    Attributes:
        ids: the compressed stream: text and VoCo tokens, in order.
        blocks: what its runs of VoCo tokens stand for, in order: a cache of one row.
        keys: the store's key of each block; an engine in another process reads the blocks by them.
        sampling: how the answer is drawn.
    """

    ids: tuple[int, ...]
    blocks: VoCoCache
    keys: tuple[str, ...]
    sampling: Sampling


class Step(NamedTuple):
    """One token of an answer.

    Attributes:
        token: its id.
        logprob: its log-probability, where asked for.
        alternatives: ids and log-probabilities of the likeliest tokens, likeliest first.
    """

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Answer:
    """The tokens of one request, for one reader in the event loop that it was submitted in.

    An engine's threads call :meth:`put`, :meth:`end` and :meth:`fail`, each from any thread.

    Args:
        loop: the reader's event loop; ``None``: the running one.
        on_cancel: called once, where the reader leaves before the end.

    Attributes:
        finish_reason: ``"stop"`` or ``"length"`` once the last step was read; ``"cancelled"`` after
            :meth:`cancel`.
        queued_seconds: from submission to where the engine took it up; ``None`` before.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop | None = None,
        on_cancel: Callable[[], Any] | None = None,
    ) -> None:
        self._on_cancel = on_cancel
        self._loop = loop or asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._over = False
        self.finish_reason: str | None = None
        self.queued_seconds: float | None = None

    def __aiter__(self) -> AsyncIterator[Step]:
        return self

    async def __anext__(self) -> Step:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, BaseException):
            self.finish_reason = "error"
            raise event
        if isinstance(event, str):
            self.finish_reason = event
            raise StopAsyncIteration
        return event

    def _send(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the reader's event loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def put(self, step: Step) -> None:
        """A token more."""
        if not self._over:
            self._send(step)

    @staticmethod
    def put_all(steps: Sequence[tuple[Answer, Step]]) -> None:
        """A token more of each of several answers; an event loop is woken once for all of its own."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Answer, Step]]] = {}
        for answer, step in steps:
            if not answer._over:
                by_loop.setdefault(answer._loop, []).append((answer, step))
        for loop, some in by_loop.items():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_put_all, some)

    def end(self, finish_reason: str) -> None:
        """No more tokens will come. Only the first end counts."""
        if not self._over:
            self._over = True
            self._send(finish_reason)

    def fail(self, error: BaseException) -> None:
        """The answer ends with ``error``, which the reader gets."""
        if not self._over:
            self._over = True
            self._send(error)

    def cancel(self) -> None:
        """Nobody reads on; the engine stops at its next step. More than once does nothing more."""
        if not self._over:
            self.end("cancelled")
            if self._on_cancel is not None:
                self._on_cancel()

    @property
    def over(self) -> bool:
        """Whether it has ended, read to the end or not."""
        return self._over


def _put_all(steps: Sequence[tuple[Answer, Step]]) -> None:
    for answer, step in steps:
        answer._events.put_nowait(step)


class Engine(abc.ABC):
    """What answers requests. Methods may be called from any thread; :meth:`submit` in an event loop.

    Attributes:
        name: as a log calls it.
        max_positions: tokens of a prompt and its answer together, at most.
    """

    name: str
    max_positions: int

    @abc.abstractmethod
    def start(self) -> None:
        """Ready to answer once it returns.

        Raises:
            EngineError: it cannot serve this model; the message says why.
        """

    @abc.abstractmethod
    def check(self, request: EngineRequest) -> None:
        """Refuse what cannot be answered.

        Raises:
            RequestError: too long, or a setting that this engine does not honour.
        """

    @abc.abstractmethod
    def submit(self, request: EngineRequest) -> Answer:
        """Begin to answer ``request``, which :meth:`check` has taken.

        Raises:
            EngineError: it is stopping, or gone.
        """

    @abc.abstractmethod
    def stop(self, drain_seconds: float = 0.0) -> None:
        """Finish what runs within ``drain_seconds``, fail the rest, and end."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """``{"ready": bool, "running": requests, "waiting": requests, "restarts": times, "error": last
        reason or None}``.
        """


def check_length(request: EngineRequest, max_positions: int) -> None:
    """Refuse an answer that would not end within the model's positions.

    Raises:
        RequestError: the prompt is empty or, with its answer, longer.
    """
    prompt, new = len(request.ids), request.sampling.max_new_tokens
    if not prompt:
        raise RequestError("the prompt is empty; send some text.", "messages")
    if new < 1:
        raise RequestError(f"max_tokens={new}: an answer has 1 token or more.", "max_tokens")
    if prompt + new > max_positions:
        raise RequestError(
            f"the prompt takes {prompt} tokens and max_tokens asks for {new} more, which is {prompt + new}; "
            f"this model has {max_positions} positions: shorten the prompt or ask for fewer tokens.",
            "messages" if prompt >= max_positions else "max_tokens",
            "context_length_exceeded",
        )


__all__ = [
    "Answer",
    "Engine",
    "EngineError",
    "EngineRequest",
    "RequestError",
    "Sampling",
    "Step",
    "check_length",
]
