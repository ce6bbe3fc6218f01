"""``EmbeddedEngine``: many requests answered together by transformers' continuous batching, in this process.

An exception in its loop ends the requests that were in it, with the reason, and the loop begins anew; what is
submitted meanwhile waits for it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ....cache.fingerprint import blocks_made_by, differences_to_reader
from ....cache.place.relocation import Relocator
from ....core.attachment import attachment, unwrap
from ..request import Answer, Engine, EngineError, EngineRequest, RequestError, Step, check_length
from .manager import BatchLimits, BlocksManager, bytes_of_page
from .paged_blocks import NoIdsLeftError, PagedBlocks, check_upstream
from .sampling import Draws, PerRequestSampler

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.05
_STOPPED = "the server was stopped before this answer was whole"
_FAILED = "the engine failed under this request"
_SOON_SECONDS, _WAIT_LONGEST = 30.0, 10.0


@dataclass
class _Live:
    """A request from its submission to its end."""

    name: str
    request: EngineRequest
    answer: Answer
    ends: frozenset[int]
    draws: Draws
    submitted: float
    held: list[int] = field(default_factory=list)
    loop: int | None = None  # which life of the loop has it


class EmbeddedEngine(Engine):
    """Answers from an attached model's language model and its blocks.

    Args:
        model: attached; it compresses, and its fingerprint is that of the blocks taken.
        text_model: its language model (:func:`~voco_plugin.serving.text_model.text_model_of`).
        limits: how much runs at a time.
    """

    name = "embedded"

    def __init__(self, model: Any, text_model: Any, limits: BatchLimits | None = None) -> None:
        check_upstream()
        if text_model.config._attn_implementation == "eager":
            if not text_model._supports_sdpa:
                raise EngineError(
                    f"{type(text_model).__name__} has eager attention only, which is not what continuous "
                    "batching masks; use another engine."
                )
            text_model.set_attn_implementation("sdpa")  # the same sums
        inner, state = unwrap(model), attachment(model)
        self.text_model, self.limits = text_model, limits or BatchLimits()
        self.max_positions = int(text_model.config.max_position_embeddings)
        self.max_tokens = (
            self.limits.kv_bytes // bytes_of_page(text_model, self.limits.page_tokens) - 1
        ) * self.limits.page_tokens
        self._voco_id = state.vocab.voco_id
        self._input_only = {state.vocab.voco_id, *state.vocab.placeholders}
        self._made_by = blocks_made_by(inner, state)
        self._eos = _ends_of(text_model)
        self._live: dict[str, _Live] = {}
        self._waiting: list[_Live] = []
        self._left: list[str] = []
        self._drawn: list[tuple[Answer, Step]] = []  # on the loop's thread
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._manager: BlocksManager | None = None
        self._blocks: PagedBlocks | None = None
        self._life = 0
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._hooks: list[Any] = []
        self._restarts = 0
        self._error: str | None = None
        self._anew = False

    # -- the interface

    def start(self) -> None:
        """Begin the loop, and ask it once with a block beside the plain model.

        Raises:
            EngineError: it answers otherwise than the plain model.
        """
        from .probe import check_answers

        with torch.no_grad():
            relocator = Relocator(self.text_model.base_model, multi_axis=False)
            relocator.move(self._no_block(), torch.zeros(1, dtype=torch.long, device=self.text_model.device))
        self._relocator = relocator
        self._begin()
        self._watcher = threading.Thread(target=self._watch, name="voco-engine-watch", daemon=True)
        self._watcher.start()
        try:
            check_answers(self, self._voco_id)
        except BaseException:
            self.stop()
            raise

    def check(self, request: EngineRequest) -> None:
        check_length(request, self.max_positions)
        needed = len(request.ids) + request.sampling.max_new_tokens
        if needed > self.max_tokens:
            raise RequestError(
                f"the prompt and max_tokens together take {needed} tokens, and this server's cache holds "
                f"{self.max_tokens}; ask for fewer.",
                "max_tokens",
                "context_length_exceeded",
            )
        counted = [len(list(run)) for voco, run in itertools.groupby(request.ids, self._is_voco) if voco]
        blocks = request.blocks.num_tokens
        if sum(counted) != sum(blocks) or len(request.keys) != len(blocks):
            raise RequestError(
                f"the prompt holds {sum(counted)} VoCo tokens, and its {len(blocks)} block(s) {sum(blocks)}."
            )
        if self._is_voco(request.ids[-1]):
            raise RequestError("the prompt ends with an image; put the question after it.", "messages")
        rows = self.text_model.config.vocab_size
        outside = next((i for i in request.ids if not 0 <= i < rows), None)
        if outside is not None:
            raise RequestError(f"token id {outside} is none of this model's {rows}.", "prompt")
        odd = [i for i in request.sampling.logit_bias if not 0 <= i < rows]
        if odd:
            raise RequestError(f"logit_bias names token {odd[0]}, none of this model's {rows}.", "logit_bias")
        if blocks:
            wrong = differences_to_reader(self._made_by, request.blocks.fingerprint)
            if wrong:
                raise RequestError(f"a block was made by another model: {'; '.join(wrong)}.", "messages")
            dtype = {block.dtype for block in request.blocks}
            if dtype != {self.text_model.dtype}:
                raise RequestError(f"blocks of {dtype} for a model of {self.text_model.dtype}.", "messages")

    def submit(self, request: EngineRequest) -> Answer:
        name = f"r{next(self._numbers)}"
        answer = Answer(on_cancel=lambda: self._leave(name))
        ends = frozenset(request.sampling.stop_ids) | (
            frozenset() if request.sampling.ignore_eos else self._eos
        )
        draws = Draws(
            request.sampling, bool(len(request.blocks)), lambda step: self._drawn.append((answer, step))
        )
        live = _Live(name, request, answer, ends, draws, time.perf_counter())
        with self._lock:
            if self._stopping.is_set() or self._watcher is None:
                raise EngineError("the server is stopping; send the request to another, or again later.")
            self._live[name] = live
            self._waiting.append(live)
            self._hand_over()
        return answer

    def stop(self, drain_seconds: float = 0.0) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
        until = time.monotonic() + drain_seconds
        while self._live and time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        self._end_loop(_STOPPED)

    def state(self) -> dict[str, Any]:
        with self._lock:
            running = sum(1 for live in self._live.values() if live.draws.tokens)
            manager = self._manager
            ready = manager is not None and manager.is_running() and not self._stopping.is_set()
            return {
                "ready": ready,
                "running": running,
                "waiting": len(self._live) - running,
                "restarts": self._restarts,
                "error": self._error,
            }

    # -- one life of the loop

    def _begin(self) -> None:
        with self._lock:
            self._life += 1
            device = self.text_model.device
            self._blocks = PagedBlocks(self._relocator, self._voco_id, device)
            self._hooks = self._blocks.attach(self.text_model)
            sampler = PerRequestSampler(self._draws_of, tuple(self._input_only), self._send)
            self._manager = BlocksManager(
                self.text_model, self.limits, self._blocks, sampler, self._delivered, self._before_step
            )
            self._manager.start()
            self._anew = False
            self._hand_over()

    def _hand_over(self) -> None:
        """Give what waits to the loop, where there is one; under the lock."""
        manager, blocks = self._manager, self._blocks
        if manager is None or blocks is None or not manager.is_running() or self._anew:
            return
        while self._waiting:
            live = self._waiting[0]
            if live.answer.over:
                self._waiting.pop(0)
                self._live.pop(live.name, None)
                continue
            try:
                ids = self._virtual(live, blocks)
            except NoIdsLeftError:
                self._anew = True  # the watcher begins anew once nothing runs
                self._let_go(live)
                return
            given = manager.add_request(
                ids, request_id=live.name, max_new_tokens=live.request.sampling.max_new_tokens,
                eos_token_id=list(live.ends) or -1,
            )  # fmt: skip
            if given is None:  # it died a moment ago
                self._let_go(live)
                return
            live.loop = self._life
            self._waiting.pop(0)

    def _virtual(self, live: _Live, blocks: PagedBlocks) -> list[int]:
        """The ids of a request, those of each block in the places of its VoCo tokens."""
        ids: list[int] = list(live.request.ids)
        at = (i for i, token in enumerate(live.request.ids) if self._is_voco(token))
        for key, block in zip(live.request.keys, live.request.blocks, strict=True):
            own = blocks.hold(f"{key}/{block.position}/{block.num_tokens}", block)
            live.held.append(own[0])
            for virtual in own:
                ids[next(at)] = virtual
        return ids

    def _let_go(self, live: _Live) -> None:
        held, live.held = live.held, []
        for first in held:
            assert self._blocks is not None
            self._blocks.release(first)

    def _is_voco(self, token: int) -> bool:
        return token == self._voco_id

    def _draws_of(self, name: str) -> Draws | None:
        live = self._live.get(name)
        if live is None:
            return None
        if live.answer.queued_seconds is None:
            live.answer.queued_seconds = time.perf_counter() - live.submitted
        return live.draws

    def _send(self) -> None:
        """What a step has drawn goes out; on the loop's thread."""
        drawn, self._drawn = self._drawn, []
        Answer.put_all(drawn)

    def _delivered(self, output: Any) -> None:
        """A request has ended; on the loop's thread."""
        live = self._live.get(output.request_id)
        if live is None or not output.is_finished():
            return
        self._forget(live)
        if output.error is not None:
            why = _STOPPED if self._stopping.is_set() else f"{_FAILED}: {output.error}"
            live.answer.fail(EngineError(why))
        else:
            last = live.draws.tokens[-1] if live.draws.tokens else None
            live.answer.end("stop" if last in live.ends else "length")

    def _forget(self, live: _Live) -> None:
        with self._lock:
            if self._live.pop(live.name, None) is not None:
                self._let_go(live)

    def _leave(self, name: str) -> None:
        """The reader of an answer has left."""
        with self._lock:
            live = self._live.get(name)
            if live is None:
                return
            if live.loop is None:
                self._forget(live)
                if live in self._waiting:
                    self._waiting.remove(live)
                return
            self._left.append(name)
            if self._manager is not None:
                self._manager.cancel_request(name)

    def _before_step(self) -> None:
        """Forget who left once the loop has; its blocks may be read until then."""
        if not self._left:
            return
        with self._lock:
            manager, stay = self._manager, []
            for name in self._left:
                live = self._live.get(name)
                if live is None:
                    continue
                if manager is not None and (manager.has(name) or not manager.cancel_queue.empty()):
                    stay.append(name)
                else:
                    self._forget(live)
            self._left = stay

    # -- what keeps it alive

    def _watch(self) -> None:
        last, pause = time.monotonic(), 0.0
        while not self._stopping.wait(_LOOK_SECONDS):
            manager = self._manager
            if self._anew and not any(live.loop for live in self._live.values()):
                self._end_loop("")
                self._begin()
                continue
            if manager is None or manager.is_running():
                continue
            reason = manager.background_thread_status.fatal_error
            self._error = f"{type(reason).__name__}: {reason}" if reason else "its thread ended"
            _log.error("the engine's loop died (%s); it begins anew", self._error)
            self._end_loop(f"{_FAILED}: {self._error}")
            again = time.monotonic()
            pause = min(_WAIT_LONGEST, 2 * pause + 0.1) if again - last < _SOON_SECONDS else 0.0
            last = again
            if self._stopping.wait(pause):
                return
            self._restarts += 1
            try:
                self._begin()
            except Exception as problem:  # memory that is short now may not be in a while
                self._error = f"{type(problem).__name__}: {problem}"
                _log.exception("the engine's loop could not begin anew")
                with self._lock:
                    self._manager = _Dead(problem)  # type: ignore[assignment]

    def _end_loop(self, why: str) -> None:
        """The loop is over; what it had ends with ``why``."""
        manager = self._manager
        if isinstance(manager, BlocksManager):
            if manager.is_running():
                manager.stop(block=True, hard_stop=True)
            manager.destroy()
        with self._lock:
            for handle in self._hooks:
                handle.remove()
            self._hooks, self._left = [], []
            ended = [live for live in self._live.values() if live.loop is not None or self._stopping.is_set()]
            for live in ended:
                self._live.pop(live.name, None)
                live.answer.fail(EngineError(why))
            if self._stopping.is_set():
                self._waiting.clear()
                self._manager = None
            self._blocks = None

    def _no_block(self) -> Any:
        config = self.text_model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layer = torch.zeros(heads, 1, width, device=self.text_model.device, dtype=self.text_model.dtype)
        return [layer] * config.num_hidden_layers, [layer] * config.num_hidden_layers


class _Dead:
    """Stands for a loop that could not begin, until it can."""

    def __init__(self, problem: Exception) -> None:
        class Status:
            fatal_error = problem

        self.background_thread_status = Status

    def is_running(self) -> bool:
        return False


def _ends_of(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())


__all__ = ["EmbeddedEngine"]
