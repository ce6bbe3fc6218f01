"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .answering_plan import Answers, check_stream_options, choices_of, sampling_of, stops_of
from .choices import TokenLogprob
from .client_gone import EventStream, unless_gone
from .errors import ApiError
from .front import Front
from .prompt_building import build_chat
from .request_fields import read_request
from .request_record import record_of
from .schemas import ChatRequest


async def chat(front: Front, request: Request) -> Response:
    """Answer a conversation about images.

    Raises:
        ApiError: the request is wrong, or cannot be answered now.
        EngineError: the engine failed.
    """
    until = front.until()
    asked = await read_request(ChatRequest, front, await request.body())
    work = _answers(front, request, asked)
    shown = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": front.model_name}
    if not asked.stream:
        return await unless_gone(request.receive, _whole(work, shown), until)
    with_usage = check_stream_options(asked)
    answers = await unless_gone(request.receive, work, until)
    record_of(request.scope).stream = True
    return EventStream(_events(answers, shown, with_usage), until, answers.cancel)


async def _answers(front: Front, request: Request, asked: ChatRequest) -> Answers:
    """Everything is checked that can be before anything is compressed."""
    record = record_of(request.scope)
    front.check_model(asked.model)
    check_stream_options(asked)
    stops, logprobs, longest = stops_of(asked, front), _logprobs(asked), _longest(asked)
    count = choices_of(asked, front, record)
    prompt = await build_chat(front, asked.messages, asked.num_tokens, record)
    sampling = sampling_of(asked, front, prompt, longest, logprobs)
    return Answers(front, record, [(prompt, sampling)], count, stops, logprobs is not None)


def _logprobs(asked: ChatRequest) -> int | None:
    if asked.logprobs:
        return asked.top_logprobs or 0
    if asked.top_logprobs is not None:
        raise ApiError("top_logprobs needs logprobs; set logprobs, or leave it out.", "top_logprobs")
    return None


def _longest(asked: ChatRequest) -> int | None:
    both = (asked.max_completion_tokens, asked.max_tokens)
    if None not in both and both[0] != both[1]:
        raise ApiError(
            f"max_completion_tokens={both[0]} and max_tokens={both[1]} are two limits; give one.",
            "max_tokens",
        )
    return both[1] if both[0] is None else both[0]


async def _whole(work: Any, shown: dict[str, Any]) -> Response:
    answers = await work
    choices = [
        {
            "index": found.index,
            "message": {"role": "assistant", "content": found.text, "refusal": None},
            "logprobs": _content(found.logprobs) if answers.choices[found.index].with_logprobs else None,
            "finish_reason": found.finish_reason,
        }
        for found in await answers.whole()
    ]
    usage = answers.usage().model_dump()
    return JSONResponse({**shown, "object": "chat.completion", "choices": choices, "usage": usage})


async def _events(
    answers: Answers, shown: dict[str, Any], with_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    usage: dict[str, Any] = {"usage": None} if with_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**shown, "object": "chat.completion.chunk", "choices": [choice], **usage}

    for choice in answers.choices:
        yield chunk(choice.index, {"role": "assistant", "content": "", "refusal": None})
    async for delta in answers.deltas():
        logprobs = _content(delta.logprobs) if delta.logprobs else None
        if delta.text or logprobs:
            yield chunk(delta.index, {"content": delta.text}, logprobs)
        if delta.finish_reason is not None:
            yield chunk(delta.index, {}, None, delta.finish_reason)
    if with_usage:
        yield {
            **shown, "object": "chat.completion.chunk", "choices": [], "usage": answers.usage().model_dump()
        }  # fmt: skip


def _content(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_token(one.text, one.data, one.logprob),
                "top_logprobs": [_token(*alternative) for alternative in one.alternatives],
            }
            for one in logprobs
        ],
        "refusal": None,
    }


def _token(text: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(data), "logprob": logprob}


__all__ = ["chat"]
