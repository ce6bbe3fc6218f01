"""Upstream's continuous batching with blocks in its cache and each request's own sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.logits_process import LogitsProcessorList

from .paged_blocks import PagedBlocks
from .sampling import PerRequestSampler


@dataclass(frozen=True)
class BatchLimits:
    """How much runs at a time.

    Attributes:
        kv_bytes: keys and values of all requests together. A request that cannot fit alone is refused.
        batch_tokens: tokens of one forward; longer prompts are read in pieces.
        batch_requests: requests of one forward; others wait.
        page_tokens: tokens of a page, which prompts with the same beginning share.
    """

    kv_bytes: int = 1 << 30
    batch_tokens: int = 512
    batch_requests: int = 64
    page_tokens: int = 32


class ToAnswers(OutputRouter):
    """Gives every output to one function, on the engine's thread; upstream's queue would fill unread."""

    def __init__(self, deliver: Callable[[Any], Any]) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: Any) -> None:
        self._deliver(output)

    def deliver_batch(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            self._deliver(output)


class BlocksManager(ContinuousBatchingManager):
    """One life of upstream's loop.

    Args:
        model: a ``…ForCausalLM``.
        blocks: what virtual ids stand for.
        sampler: draws the tokens.
        deliver: called with each finished or failed ``GenerationOutput``.
        before_step: called on the loop's thread before each step, and ten times a second where nothing runs.
    """

    def __init__(
        self,
        model: Any,
        limits: BatchLimits,
        blocks: PagedBlocks,
        sampler: PerRequestSampler,
        deliver: Callable[[Any], Any],
        before_step: Callable[[], Any],
    ) -> None:
        super().__init__(
            model=model,
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=limits.page_tokens,
                num_blocks=max(2, limits.kv_bytes // bytes_of_page(model, limits.page_tokens)),
                max_batch_tokens=limits.batch_tokens,
                max_requests_per_batch=limits.batch_requests,
                # what a request draws is known on the host, and blocks are put in by Python
                use_async_batching=False,
                use_cuda_graph=False,
                max_blocks_per_request=0,
            ),
        )
        self.output_router = ToAnswers(deliver)
        self.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        self.logit_processor.tensors_required = 1
        self._blocks, self._before_step = blocks, before_step

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        made = super()._create_batch_processor()
        self._blocks.wrap(made.cache)
        return made

    def _generation_loop_body(self, *args: Any, **kwargs: Any) -> bool:
        self._before_step()
        return super()._generation_loop_body(*args, **kwargs)

    def has(self, request_id: str) -> bool:
        """Whether the loop still has this request; on its thread."""
        scheduler = self.batch_processor.scheduler if self.batch_processor is not None else None
        return scheduler is not None and (
            request_id in scheduler.active_requests or request_id in scheduler.waiting_requests
        )


def bytes_of_page(model: Any, page_tokens: int) -> int:
    """Bytes of the keys and values of ``page_tokens`` tokens in every layer of ``model``."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.empty((), dtype=model.dtype).element_size()
    return 2 * config.num_hidden_layers * heads * width * page_tokens * size


__all__ = ["BatchLimits", "BlocksManager", "bytes_of_page"]
