"""vLLM answers from VoCo blocks: a KV connector that puts them into its paged cache; see ``README.md``.

    --kv-transfer-config '{"kv_connector": "VoCoConnector", "kv_role": "kv_consumer",
        "kv_connector_module_path": "voco_plugin.integrations.vllm.connector",
        "kv_connector_extra_config": {"store": "DIR"}}'

Reading order: ``request`` (what a request carries; without vLLM, for whoever sends it), ``blocks`` (the
store, and a memory of bounded size before it), ``placing`` (a prompt's blocks as one tensor), ``scheduler``
and ``worker`` (vLLM's two sides), ``refusals`` (what is refused at start), ``connector`` (vLLM's interface).
vLLM is imported by the last four alone.
"""

from __future__ import annotations

from typing import Any

from .request import PlacedBlock, RequestRefused, request_fields, salt_of

__all__ = ["PlacedBlock", "RequestRefused", "VoCoConnector", "request_fields", "salt_of"]


def __getattr__(name: str) -> Any:
    if name == "VoCoConnector":
        from .connector import VoCoConnector

        return VoCoConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
