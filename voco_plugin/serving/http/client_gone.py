"""Work that ends when its client goes away or its time is up, and answers that are sent as they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .errors import ApiError, api_error
from .json_text import dump
from .limits import ClientGoneError
from .request_record import record_of

T = TypeVar("T")
_LAST_WORD = 2.0
"""Seconds for telling a client why its stream ends."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T], until: float) -> T:
    """What ``work`` gives; it is cancelled where nobody waits for it any more.

    Args:
        until: when it must have ended (``time.perf_counter``).

    Raises:
        ClientGoneError: the client has closed the connection.
        ApiError: the time is up (504).
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait(
            {task, gone}, timeout=max(0.0, until - time.perf_counter()), return_when=asyncio.FIRST_COMPLETED
        )
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError
        raise timed_out()
    finally:
        await _ended(task, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def timed_out() -> ApiError:
    """The answer took longer than a request may."""
    return ApiError(
        "the answer took longer than this server gives a request; ask for fewer tokens, or send it again "
        "later.",
        None, "timeout", status=504, headers={"Retry-After": "1"},
    )  # fmt: skip


class EventStream(Response):
    """Server-sent events: a JSON object each, then ``[DONE]``; what fails on the way is the last event.

    Args:
        events: closed when the client goes away, the time is up, or all is sent.
        until: when the last must have been sent (``time.perf_counter``).
        ended: called at the end, also where no event was ever asked for.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[dict[str, Any], None], until: float, ended: Callable[[], None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.until, self.ended = events, until, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        try:
            await _sent(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._send_all(send), self.until)
            await _sent(send, _body("data: [DONE]\n\n", more=False))
        except ClientGoneError:
            raise
        except Exception as problem:
            error = api_error(problem)
            record.failed(error)
            last = _body(f"event: error\ndata: {error.text()}\n\n", more=False)
            with contextlib.suppress(asyncio.TimeoutError, ClientGoneError):
                await asyncio.wait_for(_sent(send, last), _LAST_WORD)
        finally:
            self.ended()
            await self.events.aclose()

    async def _send_all(self, send: Send) -> None:
        async for event in self.events:
            await _sent(send, _body(f"data: {dump(event)}\n\n"))


async def _sent(send: Send, message: Message) -> None:
    """Some servers say by an error that the client has left."""
    try:
        await send(message)
    except OSError:
        raise ClientGoneError from None


def _body(text: str, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


__all__ = ["EventStream", "timed_out", "unless_gone"]
