"""``VoCoConnector``: vLLM's interface, handed on to the scheduler's side or the worker's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.logger import init_logger

from voco_plugin import VoCoCacheStore
from voco_plugin.cache.engine_file import EngineFile

from .blocks import BlockMemory
from .refusals import check_start
from .scheduler import SchedulerSide, StepBlocks
from .worker import WorkerSide

logger = init_logger(f"vllm.{__name__}")
MEMORY = 2**30
"""Bytes of blocks that stay in memory where the configuration names none."""
_OPTIONS = ("store", "memory")


class VoCoConnector(KVConnectorBase_V1):
    """Answers from VoCo blocks in vLLM.

    ``kv_connector_extra_config`` takes ``store`` (a store's folder, read only) and ``memory`` (bytes of
    blocks that stay in memory, 1 GiB by default). The model is a folder that `voco export` wrote.

    Raises:
        ValueError: an option is unknown or missing, or the engine is configured as is refused.
        FileNotFoundError: there is no ``voco_engine.json`` in the model's folder.
        VoCoCacheError: the store is of another model.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.engine = EngineFile.read(vllm_config.model_config.model)
        check_start(vllm_config, kv_cache_config, self.engine)
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        self._device = torch.device("cpu")
        if role is KVConnectorRole.SCHEDULER:
            store, memory = options(self._kv_transfer_config.kv_connector_extra_config)
            opened = VoCoCacheStore(store, fingerprint=self.engine.fingerprint, readonly=True)
            self.scheduler = SchedulerSide(
                self.engine,
                BlockMemory(opened, memory),
                vllm_config.model_config.dtype,
                kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
            )
            dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
            if dtype != self.engine.dtype:
                logger.warning(
                    "The model was exported in %s and runs in %s: it and its blocks are rounded to that.",
                    self.engine.dtype, dtype,
                )  # fmt: skip
            logger.info("VoCo blocks come from %s, %d bytes of them stay in memory.", store, memory)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True  # each layer is written to from Python

    # -- the scheduler's side

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduling().kv_cache_manager = kv_cache_manager

    def on_new_request(self, request: Any) -> None:
        self._scheduling().add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return self._scheduling().admit(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduling().allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._scheduling().step(scheduler_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._scheduling().finished(request)
        return False, None

    def _scheduling(self) -> SchedulerSide:
        assert self.scheduler is not None, "called on the worker's side"
        return self.scheduler

    # -- the worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = self._vllm_config.compilation_config.static_forward_context
        self._device = next(iter(kv_caches.values())).device
        self.worker = WorkerSide(
            {name: layers[name] for name in kv_caches},
            self.engine.num_layers,
            self._vllm_config.model_config.dtype,
        )

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepBlocks)
        self._working().bind(connector_metadata, self._device)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._working().clear()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: it comes after the forward where no tokens are announced, and blocks announce none."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._working().write(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: blocks are read, never written."""

    def wait_for_save(self) -> None:
        """Nothing."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        refused = self._working().take_refused()
        return KVConnectorTransferResults(finished_recving=set(refused), failed_recving=refused)

    def _working(self) -> WorkerSide:
        assert self.worker is not None, "called before vLLM registered its KV caches"
        return self.worker

    # -- both

    def shutdown(self) -> None:
        if self.scheduler is not None:
            self.scheduler.memory.store.close()


def options(given: dict[str, Any]) -> tuple[Path, int]:
    """Store and bytes of memory, out of ``kv_connector_extra_config``.

    Raises:
        ValueError: one is missing, unknown or of another type.
    """
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        raise ValueError(
            f"VoCoConnector: kv_connector_extra_config has no {unknown[0]!r}; it takes {', '.join(_OPTIONS)}."
        )
    store, memory = given.get("store"), given.get("memory", MEMORY)
    if not isinstance(store, str) or not store:
        raise ValueError(f"VoCoConnector: store={store!r} is not a folder; name the store of the blocks.")
    if type(memory) is not int or memory < 0:
        raise ValueError(f"VoCoConnector: memory={memory!r} is not a number of bytes, 0 or more.")
    return Path(store), memory
