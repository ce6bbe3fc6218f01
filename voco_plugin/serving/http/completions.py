"""``POST /v1/completions``: text goes on, without images."""

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
from .prompt_building import BuiltPrompt, built_text
from .request_fields import read_request
from .request_record import record_of
from .schemas import CompletionRequest

_MAX_LOGPROBS = 5


async def completions(front: Front, request: Request) -> Response:
    """Go on with texts or token ids.

    Raises:
        ApiError: the request is wrong, or cannot be answered now.
        EngineError: the engine failed.
    """
    until = front.until()
    asked = await read_request(CompletionRequest, front, await request.body())
    work = _answers(front, request, asked)
    shown = {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
        "model": front.model_name,
    }  # fmt: skip
    if not asked.stream:
        return await unless_gone(request.receive, _whole(work, shown), until)
    with_usage = check_stream_options(asked)
    answers = await unless_gone(request.receive, work, until)
    record_of(request.scope).stream = True
    return EventStream(_events(answers, shown, with_usage), until, answers.cancel)


async def _answers(front: Front, request: Request, asked: CompletionRequest) -> Answers:
    front.check_model(asked.model)
    check_stream_options(asked)
    if asked.logprobs is not None and asked.logprobs > _MAX_LOGPROBS:
        raise ApiError(f"logprobs={asked.logprobs} is too many; ask for {_MAX_LOGPROBS} at most.", "logprobs")
    given = _prompts(asked.prompt)
    record = record_of(request.scope)
    stops, count = stops_of(asked, front), choices_of(asked, front, record, len(given))
    prompts = await front.in_prompt_thread(_build, front, given)
    planned = [
        (prompt, sampling_of(asked, front, prompt, asked.max_tokens, asked.logprobs)) for prompt in prompts
    ]
    return Answers(front, record, planned, count, stops, asked.logprobs is not None)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """One or more texts or lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError("prompt is an empty list; give a text, or token ids.", "prompt")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


def _build(front: Front, given: Sequence[str | list[int]]) -> list[BuiltPrompt]:
    built = []
    for one in given:
        if isinstance(one, str):
            front.marks.check_text(one, "prompt")
            if len(one) > front.settings.max_text:
                raise ApiError(
                    f"the prompt has {len(one)} characters, and this server takes {front.settings.max_text}; "
                    "shorten it.",
                    "prompt", "context_length_exceeded",
                )  # fmt: skip
            tokenizer = getattr(front.processor, "tokenizer", front.processor)
            ids = list(tokenizer(one)["input_ids"])
        else:
            ids = one
            if len(ids) > front.engine.max_positions:
                raise ApiError(
                    f"the prompt has {len(ids)} tokens; this model has {front.engine.max_positions} "
                    "positions: shorten it.",
                    "prompt", "context_length_exceeded",
                )  # fmt: skip
        if not ids:
            raise ApiError("the prompt is empty; give a text, or token ids.", "prompt")
        front.marks.check_ids(ids, front.vocabulary_size, "prompt")
        built.append(built_text(ids))
    return built


async def _whole(work: Any, shown: dict[str, Any]) -> Response:
    answers = await work
    choices = [
        {
            "index": found.index, "text": found.text,
            "logprobs": _named(found.logprobs) if answers.choices[found.index].with_logprobs else None,
            "finish_reason": found.finish_reason,
        }
        for found in await answers.whole()
    ]  # fmt: skip
    return JSONResponse({**shown, "choices": choices, "usage": answers.usage().model_dump()})


async def _events(
    answers: Answers, shown: dict[str, Any], with_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    async for delta in answers.deltas():
        choice = {
            "index": delta.index, "text": delta.text, "finish_reason": delta.finish_reason,
            "logprobs": _named(delta.logprobs) if delta.logprobs else None,
        }  # fmt: skip
        yield {**shown, "choices": [choice], **usage}
    if with_usage:
        yield {**shown, "choices": [], "usage": answers.usage().model_dump()}


def _named(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As completions have them: four lists, a token's text as its name."""
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [{text: value for text, _, value in one.alternatives} for one in logprobs],
        "text_offset": [one.offset for one in logprobs],
    }


__all__ = ["completions"]
