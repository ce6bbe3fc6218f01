"""``Front``: what every route of one server works with."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from ...config import nearest
from ...core.attachment import attachment
from ...core.layout import tokenizer_of
from ..blocks import Blocks
from ..engines.request import Engine
from .errors import ApiError
from .fetching import Fetcher
from .image_marks import ImageMarks
from .known_prompts import KnownPrompts
from .limits import Queue
from .metrics import Metrics
from .settings import ServerSettings
from .token_bytes import TokenBytes

T = TypeVar("T")


class Front:
    """A model behind routes.

    A tokenizer is not for several threads at once, and stage 1 has its own use of the processor; so prompts
    are built with one copy of it, in one thread, and answers are read with another, in the event loop.

    Args:
        settings: limits.
        engine: answers.
        blocks: compresses and keeps.
        model: attached; only its vocabulary is read.
        processor: its processor.
        model_name: what clients call it.
        fetcher: of remote images; made of ``settings`` where left out.
    """

    def __init__(
        self,
        settings: ServerSettings,
        engine: Engine,
        blocks: Blocks,
        model: Any,
        processor: Any,
        model_name: str,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.settings, self.engine, self.blocks = settings, engine, blocks
        self.model, self.model_name = model, model_name
        self.processor = copy.deepcopy(processor)
        self.tokenizer = copy.deepcopy(tokenizer_of(processor))
        self.vocabulary = attachment(model).vocab
        self.vocabulary_size = int(model.config.get_text_config().vocab_size)
        self.marks = ImageMarks(self.processor, self.vocabulary)
        self.token_bytes = TokenBytes(self.tokenizer)
        self.fetcher = fetcher or Fetcher(settings)
        self.queue = Queue(settings)
        self.known_prompts = KnownPrompts()
        self.metrics = Metrics(engine, blocks)
        self.created = int(time.time())
        self.open()

    def open(self) -> None:
        """Requests are taken, also after :meth:`close`."""
        self.queue.draining = False
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="voco-prompt")
        self._media = ThreadPoolExecutor(self.settings.decoding_threads, thread_name_prefix="voco-media")

    async def in_prompt_thread(self, work: Callable[..., T], *args: Any) -> T:
        """``work(*args)`` where the processor may be used."""
        return await _in(self._prompts, work, *args)

    async def in_media_thread(self, work: Callable[..., T], *args: Any) -> T:
        """``work(*args)`` where images are decoded."""
        return await _in(self._media, work, *args)

    def until(self) -> float:
        """When a request that has been read now must have ended (``time.perf_counter``)."""
        return time.perf_counter() + self.settings.request_seconds

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not this one.

        Raises:
            ApiError: it is another.
        """
        if name is not None and name != self.model_name:
            raise ApiError(
                f"there is no model {name[:80]!r}{nearest(name[:80], [self.model_name])}; this server has "
                f"{self.model_name!r}.",
                "model", "model_not_found", status=404,
            )  # fmt: skip

    def close(self) -> None:
        """No request is taken, and no thread is started any more."""
        self.queue.draining = True
        self._prompts.shutdown(wait=False, cancel_futures=True)
        self._media.shutdown(wait=False, cancel_futures=True)


async def _in(executor: Executor, work: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work, *args)


__all__ = ["Front"]
