"""What the connector does not do, refused by name when the engine starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from voco_plugin.cache.engine_file import EngineFile

_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds whose angle grows by the same amount from one position to the next, so that a key can be moved."""
_ONE = {
    "tensor_parallel_size": "key-value heads of a block are not cut up for several workers",
    "pipeline_parallel_size": "layers of a block are not given to several workers",
    "decode_context_parallel_size": "the tokens of a block are not spread over several workers",
    "prefill_context_parallel_size": "the tokens of a block are not spread over several workers",
}


def check_start(config: Any, cache: Any, engine: EngineFile) -> None:
    """Refuse what would answer from other keys and values than the model's.

    Args:
        config: vLLM's ``VllmConfig``.
        cache: its ``KVCacheConfig``.

    Raises:
        ValueError: by name, with the reason.
    """
    problem = next(_problems(config, cache, engine), None)
    if problem is not None:
        raise ValueError(f"VoCoConnector: {problem}.")


def _problems(config: Any, cache: Any, engine: EngineFile) -> Iterator[str]:
    parallel, model, transfer = config.parallel_config, config.model_config, config.kv_transfer_config
    for name, why in _ONE.items():
        if getattr(parallel, name, 1) > 1:
            yield f"{name}={getattr(parallel, name)} is refused: {why}; use 1, and data parallelism for more"
    if parallel.use_ubatching:
        yield "micro-batches (enable_dbo, ubatch_size) are refused: they were not tried"
    if config.speculative_config is not None:
        yield "speculative decoding is refused: its draft model would not see the blocks"
    if transfer.kv_load_failure_policy != "fail":
        yield (
            f"kv_load_failure_policy={transfer.kv_load_failure_policy!r} is refused: a request that is "
            "refused would be answered from VoCo tokens without an image; leave it out"
        )
    if transfer.kv_role != "kv_consumer":
        yield f"kv_role={transfer.kv_role!r} is refused: blocks are read, never written; use kv_consumer"
    if model.runner_type != "generate":
        yield f"runner {model.runner_type!r} is refused: only answers are generated from blocks"
    if model.is_multimodal_model or model.is_encoder_decoder:
        yield "the model is not a language model alone; serve the folder that voco export wrote"
    yield from _attention(config, cache)
    yield from _model(config, cache, engine)


def _attention(config: Any, cache: Any) -> Iterator[str]:
    model, kind = config.model_config, config.cache_config.cache_dtype
    if model.use_mla:
        yield "multi-head latent attention is refused: it keeps no keys that a block's could replace"
    if kind != "auto" and getattr(torch, kind, None) is not model.dtype:
        yield f"kv_cache_dtype={kind!r} is refused: blocks are written in the model's dtype; use 'auto'"
    groups = cache.kv_cache_groups
    if len(groups) != 1:
        yield f"a KV cache of {len(groups)} groups is refused: its layers do not share one table of blocks"
        return
    for spec in _specs(groups[0].kv_cache_spec):
        window, chunk = (getattr(spec, name, None) for name in ("sliding_window", "attention_chunk_size"))
        if window or chunk:
            yield (
                f"sliding windows and chunks are refused (sliding_window={window}, "
                f"attention_chunk_size={chunk}): they were not compared"
            )
        if type(spec) is not FullAttentionSpec or spec.non_causal:
            yield f"a KV cache of {type(spec).__name__} is refused: only full causal attention was compared"


def _specs(spec: Any) -> list[Any]:
    """The layers' own, where a group joins several."""
    inner = getattr(spec, "kv_cache_specs", None)
    return list(inner.values()) if inner else [spec]


def _model(config: Any, cache: Any, engine: EngineFile) -> Iterator[str]:
    model = config.model_config
    if engine.positions != "compact":
        yield (
            f"positions={engine.positions!r} is refused: vLLM counts the tokens of the prompt alone; export "
            "a checkpoint with positions='compact'"
        )
    if model.uses_mrope:
        yield "several rope axes (mrope) are refused: a block is moved along one"
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    several = all(isinstance(value, dict) for value in rope.values())
    for values in rope.values() if rope and several else [rope]:
        kind = values.get("rope_type", "default")
        if kind not in _ROPES:
            yield f"rope_type={kind!r} is refused: its angles depend on the length, so no block can be moved"
    if model.max_model_len > engine.max_positions:
        yield (
            f"max_model_len={model.max_model_len} is refused: the model has {engine.max_positions} positions"
        )
    if not 0 <= engine.voco_id < model.get_vocab_size():
        yield f"voco_id={engine.voco_id} is refused: the model has {model.get_vocab_size()} tokens"
    spec = _specs(cache.kv_cache_groups[0].kv_cache_spec)[0]
    found = len(cache.kv_cache_groups[0].layer_names), spec.num_kv_heads, spec.head_size
    wanted = engine.num_layers, engine.num_kv_heads, engine.head_dim
    if found != wanted:
        yield (
            f"layers, key-value heads and head dim {found} are refused: voco_engine.json has {wanted}; serve "
            "the folder that voco export wrote, with its file"
        )
