"""``assemble``: a loaded model, its store, an engine and the HTTP front → one app."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.attachment import attachment, unwrap
from ..store.store import VoCoCacheStore
from .engines.embedded.engine import EmbeddedEngine
from .engines.embedded.manager import BatchLimits
from .engines.request import Engine
from .engines.vllm import VLLMEngine
from .http.app import create_app
from .http.settings import ServerSettings
from .kept_blocks import KeptBlocks
from .known_answer import known_answer
from .text_model import NotExportableError, refusal, text_model_of


@dataclass(frozen=True)
class ServerParts:
    """What a server is made of, besides its model.

    Attributes:
        store: a store's folder; ``None``: blocks are kept in memory alone.
        readonly: the store is read only.
        store_max_bytes: its limit.
        num_tokens: K where a request names none; ``None``: the model's.
        kv_bytes: of the embedded engine's keys and values.
        block_bytes: of blocks kept in memory.
        max_memory: of one compression's working memory.
        time_text: whether a video's frames have their times before them.
        vllm_url: of vLLM's API server, which then answers in the embedded engine's place.
        vllm_api_key: its key.
    """

    store: str | None = None
    readonly: bool = False
    store_max_bytes: int | None = None
    num_tokens: int | None = None
    kv_bytes: int = 1 << 30
    block_bytes: int = 256 << 20
    max_memory: int | None = None
    time_text: bool = False
    vllm_url: str | None = None
    vllm_api_key: str | None = None


@contextlib.contextmanager
def assemble(
    model: Any, processor: Any, name: str, settings: ServerSettings, parts: ServerParts
) -> Iterator[Any]:
    """The app of one model (attached, in evaluation mode); its store is closed at the end.

    Raises:
        NotExportableError: no engine can run its language model.
        VoCoCacheError: the store is another model's.
    """
    with contextlib.ExitStack() as stack:
        store = None
        if parts.store is not None:
            store = stack.enter_context(
                VoCoCacheStore.for_model(
                    Path(parts.store).expanduser(), model, readonly=parts.readonly,
                    max_bytes=parts.store_max_bytes,
                )
            )  # fmt: skip
        engine = _engine(model, processor, settings, parts, store)
        blocks = KeptBlocks(
            model, processor, store=store, num_tokens=parts.num_tokens, max_memory=parts.max_memory,
            memory_bytes=parts.block_bytes, times=parts.time_text,
        )  # fmt: skip
        yield create_app(settings, engine, blocks, unwrap(model), processor, name)


def _engine(model: Any, processor: Any, settings: ServerSettings, parts: ServerParts, store: Any) -> Engine:
    if parts.vllm_url is not None:
        why = refusal(model)
        if why is not None:
            raise NotExportableError(f"this model has no language model of its own for an engine: {why}.")
        if store is None or store.readonly:
            raise ValueError("vLLM reads blocks out of a store: give one that is written to.")
        return VLLMEngine(
            parts.vllm_url, store, attachment(model).vocab.voco_id, api_key=parts.vllm_api_key,
            known=lambda: known_answer(model, processor, store),
        )  # fmt: skip
    limits = BatchLimits(kv_bytes=parts.kv_bytes, batch_requests=settings.max_running)
    return EmbeddedEngine(model, text_model_of(model), limits)


__all__ = ["ServerParts", "assemble"]
