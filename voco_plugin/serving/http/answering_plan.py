"""Fields of a request → how its answers are drawn, and the engine's answers to it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence

from ..engines.request import EngineRequest, Sampling
from .answer_schemas import PromptDetails, Usage
from .choices import Choice, Delta, merged
from .errors import ApiError
from .front import Front
from .prompt_building import BuiltPrompt
from .request_record import RequestRecord
from .schemas import SamplingFields

_SEEDS = 2**63


def stops_of(request: SamplingFields, front: Front) -> tuple[str, ...]:
    """The stop strings of a request.

    Raises:
        ApiError: too many, an empty one, or one that is too long.
    """
    given = [request.stop] if isinstance(request.stop, str) else request.stop or []
    longest = front.settings.max_stop_length
    if len(given) > 4:
        raise ApiError(f"stop holds {len(given)} strings; give 4 at most.", "stop")
    for stop in given:
        if not stop:
            raise ApiError("stop holds an empty string, which is everywhere; leave it out.", "stop")
        if len(stop) > longest:
            raise ApiError(f"a stop string has {len(stop)} characters; give {longest} at most.", "stop")
    return tuple(given)


def choices_of(request: SamplingFields, front: Front, record: RequestRecord, prompts: int = 1) -> int:
    """How many answers a request asks for, of each of its prompts. From here on it has a place for each.

    Raises:
        ApiError: more than the server gives, or has room for now.
    """
    count, limit = request.n or 1, min(front.settings.max_choices, front.queue.size)
    if count * prompts > limit:
        raise ApiError(f"this request asks for {count * prompts} answers; this server gives {limit}.", "n")
    front.queue.enter(record, count * prompts - record.places)
    return count


def sampling_of(
    request: SamplingFields, front: Front, prompt: BuiltPrompt, max_tokens: int | None, logprobs: int | None
) -> Sampling:
    """How the first answer to a request is drawn.

    Args:
        max_tokens: as the request names them; ``None``: as many as the server gives, and the model has room
            for.

    Raises:
        ApiError: a value that the server does not give.
    """
    settings = front.settings
    if max_tokens is not None and max_tokens > settings.max_tokens:
        raise ApiError(
            f"max_tokens={max_tokens} is more than this server gives; ask for {settings.max_tokens} at most.",
            "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    if logprobs is not None and logprobs > settings.max_logprobs:
        raise ApiError(
            f"{logprobs} alternatives of a token are more than this server gives; ask for "
            f"{settings.max_logprobs} at most.",
            "top_logprobs",
        )  # fmt: skip
    room = front.engine.max_positions - len(prompt.ids)
    default = min(settings.default_max_tokens, settings.max_tokens, max(room, 1))
    return Sampling(
        max_new_tokens=default if max_tokens is None else max_tokens,
        temperature=settings.temperature if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),
        seed=None if request.seed is None else request.seed % _SEEDS,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_bias(request, front),
        logprobs=logprobs,
    )


def _bias(request: SamplingFields, front: Front) -> dict[int, float]:
    biases: dict[int, float] = {}
    for token, bias in (request.logit_bias or {}).items():
        if not token.isascii() or not token.isdigit() or not int(token[:20]) < front.vocabulary_size:
            raise ApiError(
                f"logit_bias names the token {token[:40]!r}; give ids from 0 to {front.vocabulary_size - 1}.",
                "logit_bias",
            )
        biases[int(token)] = bias
    return biases


def check_stream_options(request: SamplingFields) -> bool:
    """Whether the usage is to be sent at the end of a stream.

    Raises:
        ApiError: options of a stream where there is none.
    """
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options belongs to a stream; set stream, or leave it out.", "stream_options")
    return bool(request.stream_options and request.stream_options.include_usage)


class Answers:
    """The answers to one request, under way.

    Args:
        prompts: with how each is answered, in order.
        count: answers to each: each with a seed of its own, the request's plus its number.
        stops: stop strings.
        with_logprobs: whether log-probabilities were asked for.

    Raises:
        RequestError: the engine cannot answer this.
        EngineError: the engine does not answer.
    """

    def __init__(
        self,
        front: Front,
        record: RequestRecord,
        prompts: Sequence[tuple[BuiltPrompt, Sampling]],
        count: int,
        stops: Sequence[str],
        with_logprobs: bool,
    ) -> None:
        self.front, self.record = front, record
        self.prompts = [prompt for prompt, _ in prompts]
        record.choices = count * len(prompts)
        record.prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        record.voco_tokens = sum(prompt.details.voco_tokens for prompt in self.prompts)
        record.prepared_seconds = record.seconds
        requests = [
            EngineRequest(prompt.ids, prompt.blocks, prompt.keys, _seeded(sampling, number))
            for prompt, sampling in prompts
            for number in range(count)
        ]
        for request in requests:
            front.engine.check(request)
        self.choices: list[Choice] = []
        try:
            for index, request in enumerate(requests):
                answer = front.engine.submit(request)
                self.choices.append(Choice(front, record, index, answer, stops, with_logprobs))
        except BaseException:
            self.cancel()
            raise
        self._begun = time.perf_counter()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What comes of all of them."""
        metrics = self.front.metrics
        try:
            async with contextlib.aclosing(merged(self.choices)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is not None:
                        self.record.finish.append(delta.finish_reason)
                        metrics.stage_two.observe(time.perf_counter() - self._begun)
                    yield delta
        finally:
            self.cancel()
            used = self.usage()
            metrics.tokens.labels("prompt_text").inc(used.prompt_tokens_details.text_tokens)
            metrics.tokens.labels("prompt_voco").inc(used.prompt_tokens_details.voco_tokens)
            metrics.tokens.labels("saved_vision").inc(used.prompt_tokens_details.saved_vision_tokens)
            metrics.tokens.labels("completion").inc(used.completion_tokens)

    async def whole(self) -> list[Delta]:
        """Each choice in one piece.

        Raises:
            EngineError: the engine failed.
        """
        parts: list[list[Delta]] = [[] for _ in self.choices]
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                parts[delta.index].append(delta)
        return [
            Delta(
                index,
                "".join(delta.text for delta in found),
                tuple(one for delta in found for one in delta.logprobs),
                found[-1].finish_reason,
            )
            for index, found in enumerate(parts)
        ]

    def usage(self) -> Usage:
        """Tokens so far."""
        details = [prompt.details for prompt in self.prompts]
        prompt, completion = self.record.prompt_tokens, sum(choice.tokens for choice in self.choices)
        return Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(
                text_tokens=sum(one.text_tokens for one in details),
                voco_tokens=sum(one.voco_tokens for one in details),
                saved_vision_tokens=sum(one.saved_vision_tokens for one in details),
                cached_tokens=sum(one.cached_tokens for one in details),
            ),
        )  # fmt: skip

    def cancel(self) -> None:
        """Nobody reads on."""
        for choice in self.choices:
            choice.answer.cancel()


def _seeded(sampling: Sampling, number: int) -> Sampling:
    if sampling.seed is None or not number:
        return sampling
    return dataclasses.replace(sampling, seed=(sampling.seed + number) % _SEEDS)


__all__ = ["Answers", "check_stream_options", "choices_of", "sampling_of", "stops_of"]
