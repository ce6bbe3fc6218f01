"""``VLLMEngine``: requests answered by a vLLM server beside this process, which reads blocks out of the same
store (``integrations/vllm``).

What vLLM says of a bad request is an opaque error, so everything is checked here first. Before each request
its keys are put into the store if they are no longer there, and their use is recorded, since vLLM only reads.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx

from ...cache.engine_request import PlacedBlock, request_fields
from .request import (
    Answer,
    Engine,
    EngineError,
    EngineRequest,
    RequestError,
    Sampling,
    Step,
    check_length,
)

_log = logging.getLogger(__name__)
_TRIES = 2


class VLLMEngine(Engine):
    """Answers of a vLLM server that was started on this checkpoint's export.

    Args:
        url: of its API server, with or without ``/v1``.
        store: the store that it reads, opened for writing.
        voco_id: of the VoCo token.
        api_key: where it wants one.
        known: a request, its greedy answer, and how far off log-probabilities may be, asked at the start;
            ``None``: nothing is asked.
        wait_seconds: for the server to be ready.
    """

    name = "vllm"

    def __init__(
        self,
        url: str,
        store: Any,
        voco_id: int,
        *,
        api_key: str | None = None,
        known: Callable[[], tuple[EngineRequest, list[Step], float]] | None = None,
        wait_seconds: float = 60.0,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.store, self._voco_id, self._known = store, voco_id, known
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._wait = wait_seconds
        self.max_positions = 0
        self._model = ""
        self._tasks: set[asyncio.Task] = set()
        self._running = self._failed = 0
        self._error: str | None = None
        self._stopping = True
        self._clients: dict[int, httpx.AsyncClient] = {}

    # -- the interface

    def start(self) -> None:
        """Find the server, and ask it what is known.

        Raises:
            EngineError: it is not there, or answers otherwise than this model.
        """
        card = self._card()
        self._model, self.max_positions = str(card["id"]), int(card["max_model_len"])
        self._stopping = False
        if self._known is None:
            return
        request, wanted, tolerance = self._known()
        found = asyncio.run(self._ask(request)) if not _in_loop() else _elsewhere(self._ask(request))
        worst = _off(found, wanted)
        if not worst <= tolerance:
            self._stopping = True
            raise EngineError(
                f"the vLLM server at {self.url} answers a known question otherwise than this model (its "
                f"log-probabilities are off by {worst:.2g}): serve this checkpoint's voco export there."
            )

    def check(self, request: EngineRequest) -> None:
        check_length(request, self.max_positions or (1 << 31))
        counted = [len(list(run)) for voco, run in itertools.groupby(request.ids, self._is_voco) if voco]
        tokens = request.blocks.num_tokens
        if sum(counted) != sum(tokens) or len(request.keys) != len(tokens):
            raise RequestError(
                f"the prompt holds {sum(counted)} VoCo tokens, and its {len(tokens)} block(s) {sum(tokens)}."
            )
        if self._is_voco(request.ids[-1]):
            raise RequestError("the prompt ends with an image; put the question after it.", "messages")

    def submit(self, request: EngineRequest) -> Answer:
        if self._stopping:
            raise EngineError("the server is stopping; send the request to another, or again later.")
        tasks: list[asyncio.Task] = []
        answer = Answer(on_cancel=lambda: tasks[0].cancel())
        task = asyncio.get_running_loop().create_task(self._answer(request, answer))
        tasks.append(task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    def stop(self, drain_seconds: float = 0.0) -> None:
        self._stopping = True
        until = time.monotonic() + drain_seconds
        while self._running and time.monotonic() < until:
            time.sleep(0.05)
        for task in list(self._tasks):
            task.get_loop().call_soon_threadsafe(task.cancel)

    def state(self) -> dict[str, Any]:
        return {
            "ready": not self._stopping,
            "running": self._running,
            "waiting": 0,
            "restarts": 0,
            "error": self._error,
            "failed": self._failed,
        }

    # -- inside

    def _is_voco(self, token: int) -> bool:
        return token == self._voco_id

    def _card(self) -> dict[str, Any]:
        until, said = time.monotonic() + self._wait, ""
        while True:
            try:
                found = httpx.get(f"{self.url}/models", headers=self._headers, timeout=10, trust_env=False)
                if found.status_code == 401:
                    raise EngineError(f"the vLLM server at {self.url} wants a key: give --vllm-api-key KEY.")
                found.raise_for_status()
                return found.json()["data"][0]
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as problem:
                said = f"{type(problem).__name__}: {problem}"
            if time.monotonic() > until:
                raise EngineError(f"there is no vLLM server at {self.url} ({said}); start it first.")
            time.sleep(0.5)

    def _client(self) -> httpx.AsyncClient:
        loop = id(asyncio.get_running_loop())
        found = self._clients.get(loop)
        if found is None:
            limits = httpx.Limits(max_connections=None)
            found = httpx.AsyncClient(
                base_url=self.url, headers=self._headers, timeout=None, limits=limits, trust_env=False
            )
            self._clients = {loop: found}
        return found

    async def _ask(self, request: EngineRequest) -> list[Step]:
        steps = [step async for step in self.submit(request)]
        await self._client().aclose()
        self._clients = {}
        return steps

    async def _answer(self, request: EngineRequest, answer: Answer) -> None:
        self._running += 1
        start, given = time.perf_counter(), 0
        try:
            for attempt in range(_TRIES):
                await asyncio.to_thread(self._put, request)
                try:
                    async for step in self._steps(request):
                        if not given:
                            answer.queued_seconds = time.perf_counter() - start
                        given += 1
                        if isinstance(step, str):
                            answer.end(step)
                            return
                        answer.put(step)
                    raise EngineError("the vLLM server ended the answer without a reason.")
                except EngineError:
                    # a key that was evicted between the look and the read; after a token it is something else
                    if given or attempt + 1 == _TRIES or not request.keys:
                        raise
        except asyncio.CancelledError:
            answer.fail(EngineError("the server was stopped before this answer was whole"))
            raise
        except EngineError as problem:
            self._failed, self._error = self._failed + 1, str(problem)
            answer.fail(problem)
        except Exception as problem:
            _log.exception("an answer of the vLLM server could not be read")
            self._failed, self._error = self._failed + 1, str(problem)
            answer.fail(EngineError(f"an answer of the vLLM server could not be read: {problem}"))
        finally:
            self._running -= 1

    def _put(self, request: EngineRequest) -> None:
        """Let the store hold what vLLM is about to read."""
        gone = set(self.store.missing(request.keys))
        for number, key in enumerate(request.keys):
            if key in gone:
                self.store.put(key, request.blocks[number])
                gone.discard(key)
        self.store.note_use(request.keys)

    async def _steps(self, request: EngineRequest) -> Any:
        """Steps, and at the end the reason why it ended."""
        body = {
            "model": self._model, "prompt": list(request.ids), "stream": True, "return_token_ids": True,
            **_sampling_fields(request.sampling), **self._block_fields(request),
        }  # fmt: skip
        try:
            async with self._client().stream("POST", "/completions", json=body) as events:
                if events.status_code != 200:
                    said = (await events.aread()).decode(errors="replace")
                    raise EngineError(f"the vLLM server refused this request ({_message(said)})")
                async for line in events.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise EngineError(f"the vLLM server failed under this request ({_message(line[6:])})")
                    for choice in event.get("choices", ()):
                        for step in _steps_of(choice, request.sampling):
                            yield step
                        reason = choice.get("finish_reason")
                        if reason in ("stop", "length"):
                            yield reason
                        elif reason is not None:
                            raise EngineError(
                                f"the vLLM server ended this request with {reason!r}; its log says why."
                            )
        except httpx.HTTPError as problem:
            raise EngineError(
                f"the vLLM server at {self.url} is gone ({type(problem).__name__}: {problem})"
            ) from problem

    def _block_fields(self, request: EngineRequest) -> dict[str, Any]:
        if not request.keys:
            return {}
        at = [i for i, token in enumerate(request.ids) if self._is_voco(token)]
        placed, begin = [], 0
        for key, block in zip(request.keys, request.blocks, strict=True):
            placed.append(PlacedBlock(key, at[begin]))
            begin += block.num_tokens
        return request_fields(placed)


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "top_k": sampling.top_k, "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty, "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": list(sampling.stop_ids),
    }  # fmt: skip
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): value for token, value in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        fields |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    return fields


def _steps_of(choice: dict[str, Any], sampling: Sampling) -> list[Step]:
    tokens = choice.get("token_ids") or []
    if sampling.logprobs is None:
        return [Step(token) for token in tokens]
    told = choice.get("logprobs") or {}
    steps = []
    for number, token in enumerate(tokens):
        named = told["top_logprobs"][number] or {}
        pairs = ((int(name.split(":")[1]), value) for name, value in named.items())
        likeliest = sorted(pairs, key=lambda pair: -pair[1])[: sampling.logprobs]
        steps.append(Step(token, told["token_logprobs"][number], tuple(likeliest)))
    return steps


def _off(found: list[Step], wanted: list[Step]) -> float:
    """How far log-probabilities are apart, up to where another token was likeliest by a hair."""
    worst = float("inf") if not found else 0.0
    for ours, theirs in zip(wanted, found, strict=False):
        if ours.logprob is None or theirs.logprob is None:
            return float("inf")
        worst = max(worst, abs(ours.logprob - theirs.logprob))
        if ours.token != theirs.token:
            break
    return worst


def _message(text: str) -> str:
    try:
        value = json.loads(text)
        return str(value.get("error", value).get("message"))[:300]
    except (ValueError, AttributeError):
        return text[:300]


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _elsewhere(work: Any) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


__all__ = ["VLLMEngine"]
