"""The scheduler's side: whose prompts hold blocks, and what of them each step computes.

A block's tokens are scheduled as any others, and the worker overwrites what the model computed of them: so
they may stand anywhere, be cut by a chunk, be preempted and come out of the prefix cache. A request is read
when it is admitted, and what was read stays with it until it ends, since it may be preempted.

vLLM lets a connector fail one request in one way: it announces tokens that come from elsewhere, which then do
not come. A request that is refused does so for its whole prompt and computes nothing.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.logger import init_logger

from voco_plugin.cache.engine_file import EngineFile

from .blocks import BlockMemory
from .placing import PromptBlocks, prompt_blocks
from .request import PlacedBlock, RequestRefused, blocks_of_request

logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers below its own name


@dataclass
class StepBlocks(KVConnectorMetadata):
    """What one step writes, from scheduler to worker.

    Attributes:
        slots: ``(n,)`` int64, of the paged cache.
        data: ``(L, 2, n, H, D)``, keys and values; ``None`` where the step writes nothing.
        refused: ids of requests to be failed.
    """

    slots: torch.Tensor | None = None
    data: torch.Tensor | None = None
    refused: set[str] = field(default_factory=set)


@dataclass
class _Open:
    """A request that holds blocks, or is refused."""

    placed: tuple[PlacedBlock, ...] = ()
    ids: tuple[int, ...] = ()
    blocks: PromptBlocks | None = None
    refused: str | None = None


class SchedulerSide:
    """
    Args:
        engine: what the exported model's blocks are.
        memory: where blocks come from.
        dtype: of the paged cache.
        block_size: tokens of one of its blocks.
    """

    def __init__(self, engine: EngineFile, memory: BlockMemory, dtype: torch.dtype, block_size: int) -> None:
        self.engine, self.memory, self.dtype, self.block_size = engine, memory, dtype, block_size
        self.kv_cache_manager: Any = None
        self._open: dict[str, _Open] = {}
        self._failing: set[str] = set()

    def add(self, request: Any) -> None:
        """A new request: find its blocks in what it carries."""
        try:
            placed = self._blocks_of(request)
        except Exception as error:  # an exception here would end the engine
            self._refuse(request, _Open(), error)
            return
        if placed:
            self._open[request.request_id] = _Open(placed, tuple(request.prompt_token_ids))
            self._suppress(request)

    def _blocks_of(self, request: Any) -> tuple[PlacedBlock, ...]:
        engine = self.engine
        placed = blocks_of_request(
            request.prompt_token_ids,
            request.kv_transfer_params,
            request.cache_salt,
            engine.voco_id,
            engine.image_ids,
        )
        if request.resumable:  # what it goes on with would come without this check
            raise RequestRefused("a prompt that comes piece by piece is not read here; send it whole.")
        if not placed:
            return placed
        if request.sampling_params is None:
            raise RequestRefused("only answers are generated from blocks, no embeddings or scores.")
        if request.sampling_params.prompt_logprobs is not None:
            raise RequestRefused(
                "prompt_logprobs (echo with logprobs) is refused where the prompt holds blocks: what stands "
                "before a block's tokens says nothing of them; ask for logprobs of the answer."
            )
        if request.lora_request is not None:
            raise RequestRefused("blocks were made without this LoRA adapter; merge it before voco export.")
        if request.mm_features or request.prompt_embeds is not None:
            raise RequestRefused("a prompt with blocks holds no other images and no embeddings.")
        return placed

    def _suppress(self, request: Any) -> None:
        """VoCo and vision tokens are input only, as in the package's own ``generate``."""
        params = copy.copy(request.sampling_params)
        never = dict.fromkeys(self.engine.input_only, -math.inf)
        params.logit_bias = {**(params.logit_bias or {}), **never}
        request.sampling_params = params

    def _refuse(self, request: Any, state: _Open, error: Exception) -> None:
        known = isinstance(error, RequestRefused)
        state.refused = str(error) if known else f"{type(error).__name__}: {error}"
        self._open[request.request_id] = state
        logger.error(
            "Request %s is refused: %s", request.request_id, state.refused, exc_info=None if known else error
        )

    def admit(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """vLLM's ``get_num_new_matched_tokens``: how many tokens come from elsewhere, and whether later. None
        do, but for a request that is to fail.
        """
        state = self._open.get(request.request_id)
        if state is None:
            return 0, False
        if state.blocks is None and state.refused is None:
            try:
                state.blocks = prompt_blocks(state.placed, state.ids, self.engine, self.memory, self.dtype)
            except Exception as error:
                self._refuse(request, state, error)
        if state.refused is None:
            return 0, False
        request.skip_reading_prefix_cache = False  # vLLM takes no tokens from elsewhere where it is set
        return request.num_tokens - num_computed_tokens, True

    def allocated(self, request: Any, num_external_tokens: int) -> None:
        """A request that :meth:`admit` announced tokens for waits for them now."""
        if num_external_tokens:
            self._failing.add(request.request_id)

    def step(self, output: Any) -> StepBlocks:
        """What of the blocks the step ``output`` computes."""
        cached = output.scheduled_cached_reqs
        starts = {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        slots: list[int] = []
        parts: list[torch.Tensor] = []
        for name, start in starts.items():
            state = self._open.get(name)
            if state is None:
                continue
            assert state.blocks is not None, f"request {name} runs without its blocks"
            places, data = state.blocks.within(start, start + output.num_scheduled_tokens[name])
            if places:
                (table,) = self.kv_cache_manager.get_block_ids(name)
                size = self.block_size
                slots += [table[place // size] * size + place % size for place in places]
                parts.append(data)
        refused, self._failing = self._failing, set()
        if not parts:
            return StepBlocks(refused=refused)
        return StepBlocks(torch.tensor(slots, dtype=torch.int64), torch.cat(parts, dim=2), refused)

    def finished(self, request: Any) -> None:
        """It ended, or was given up."""
        self._open.pop(request.request_id, None)
        self._failing.discard(request.request_id)
