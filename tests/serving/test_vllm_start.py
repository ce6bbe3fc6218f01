"""What the connector does not do is refused by name when an engine starts.

Needs vLLM's own environment: ``make test-vllm``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_runs import GIVEN, case, needs_vllm, request_of, run
from vllm_worker import OnlyWhatIsNeeded, transfer_config
from voco_plugin.cache.engine_file import EngineFile

pytestmark = needs_vllm


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    """What `vllm_worker.py` sets for an engine's process."""
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")


def config(**arguments: Any) -> Any:
    """vLLM's own, as an engine with these arguments has it."""
    from vllm.engine.arg_utils import EngineArgs

    given = {
        "model": str(GIVEN / "engine"), "dtype": "float32", "enforce_eager": True,
        "kv_transfer_config": transfer_config(str(GIVEN / "store")), **arguments,
    }  # fmt: skip
    return EngineArgs(**given).create_engine_config()


def kv_cache(kind: str = "FullAttentionSpec", groups: int = 1, layers: int = 3, **changed: Any) -> Any:
    from vllm.v1 import kv_cache_interface as interface

    values = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32, **changed}
    spec = getattr(interface, kind)(**values)
    names = [f"model.layers.{number}.self_attn.attn" for number in range(layers)]
    group = interface.KVCacheGroupSpec(names, spec)
    return interface.KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[group] * groups)


def check(configured: Any, cache: Any, **file: Any) -> None:
    from voco_plugin.integrations.vllm.refusals import check_start

    check_start(configured, cache, dataclasses.replace(EngineFile.read(GIVEN / "engine"), **file))


ROPE = {"rope_theta": 10000.0, "factor": 2.0}
LONG = {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16, "original_max_position_embeddings": 512}
TRANSFER = transfer_config("store")


def test_what_was_compared_starts() -> None:
    assert check(config(), kv_cache()) is None  # nothing raised
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    for rope in ({"rope_type": "llama3", **ROPE, **llama3}, {"rope_type": "linear", **ROPE}):
        configured = config(hf_overrides={"rope_parameters": rope}, max_model_len=1024)
        assert check(configured, kv_cache()) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is refused: key-value heads"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 is refused"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' is refused"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype='bfloat16' is refused"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding is refused",
        ),
        (
            {"hf_overrides": {"rope_parameters": {"rope_type": "dynamic", **ROPE}}},
            "rope_type='dynamic' is refused",
        ),
        (
            {"hf_overrides": {"rope_parameters": {"rope_type": "longrope", **ROPE, **LONG}}},
            "rope_type='longrope' is refused",
        ),
        ({"hf_overrides": {"max_position_embeddings": 4096}}, "max_model_len=4096 is refused"),
        ({"runner": "pooling"}, "runner 'pooling' is refused"),
        (
            {"kv_transfer_config": {**TRANSFER, "kv_load_failure_policy": "recompute"}},
            "kv_load_failure_policy='recompute' is refused",
        ),
        ({"kv_transfer_config": {**TRANSFER, "kv_role": "kv_producer"}}, "kv_role='kv_producer' is refused"),
        ({"kv_transfer_config": {**TRANSFER, "kv_role": "kv_both"}}, "kv_role='kv_both' is refused"),
    ],
)
def test_an_engine_is_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"VoCoConnector: {message}"):
        check(config(**arguments), kv_cache())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "SlidingWindowSpec", "sliding_window": 8}, "sliding windows and chunks are refused"),
        ({"non_causal": True}, "a KV cache of FullAttentionSpec is refused: only full causal"),
        ({"sliding_window": 8}, r"sliding windows and chunks are refused \(sliding_window=8"),
        ({"attention_chunk_size": 8}, "sliding windows and chunks are refused"),
        ({"groups": 2}, "a KV cache of 2 groups is refused"),
        ({"num_kv_heads": 1}, r"layers, key-value heads and head dim \(3, 1, 32\) are refused"),
        ({"layers": 2}, r"\(2, 2, 32\) are refused: voco_engine.json has \(3, 2, 32\)"),
    ],
)
def test_a_kv_cache_is_refused_by_name(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"VoCoConnector: .*{message}"):
        check(config(), kv_cache(**changed))


def test_a_file_of_another_model_is_refused_by_name() -> None:
    for changed, message in (
        ({"positions": "sequential"}, "positions='sequential' is refused"),
        ({"voco_id": 999}, "voco_id=999 is refused"),
    ):
        with pytest.raises(ValueError, match=message):
            check(config(), kv_cache(), **changed)


def test_settings_that_vllm_takes_nowhere_here_are_refused_too() -> None:
    """Of vLLM's CPU build, whose own checks come first or which turns them off."""
    configured = config()
    for part, name, value, message in (
        ("parallel_config", "ubatch_size", 2, "micro-batches .* are refused"),
        ("parallel_config", "decode_context_parallel_size", 2, "decode_context_parallel_size=2 is refused"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill_context_parallel_size=2 is refused"),
    ):
        section = getattr(configured, part)
        before = getattr(section, name)
        object.__setattr__(section, name, value)
        with pytest.raises(ValueError, match=message):
            check(configured, kv_cache())
        object.__setattr__(section, name, before)
    assert check(configured, kv_cache()) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "store=None is not a folder"),
        ({"store": "a", "memroy": 1}, "kv_connector_extra_config has no 'memroy'; it takes store, memory"),
        ({"store": "a", "memory": "1GB"}, "memory='1GB' is not a number of bytes"),
        ({"store": "a", "memory": -1}, "memory=-1 is not a number of bytes"),
    ],
)
def test_options_are_checked(given: dict, message: str) -> None:
    from voco_plugin.integrations.vllm.connector import MEMORY, options

    assert options({"store": "a"}) == (Path("a"), MEMORY) and options({"store": "a", "memory": 0})[1] == 0
    with pytest.raises(ValueError, match=message):
        options(given)


def copied(folder: Path, change: Any) -> Path:
    """The exported model with another ``config.json``."""
    made = Path(shutil.copytree(GIVEN / "engine", folder / "engine"))
    path = made / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return made


def mistral(values: dict[str, Any]) -> dict[str, Any]:
    """Llama's weights have Mistral's names; its windows are what is wanted."""
    return {**values, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}


def test_a_model_with_windows_does_not_start(tmp_path: Path) -> None:
    steps = [{"requests": [request_of(case("K2-middle-0"))]}]
    made = run(tmp_path, steps, model=copied(tmp_path, mistral), starts=False)
    assert "VoCoConnector: sliding windows and chunks are refused (sliding_window=64" in made.log


def test_a_store_of_another_model_does_not_start(tmp_path: Path) -> None:
    made = copied(tmp_path, dict)
    file = EngineFile.read(made)
    dataclasses.replace(file, fingerprint={**file.fingerprint, "model": "0" * 32}).write(made)
    log = run(tmp_path, [], model=made, starts=False).log
    assert "VoCoCacheError" in log and "model" in log


def test_a_folder_without_its_file_does_not_start(tmp_path: Path) -> None:
    made = copied(tmp_path, dict)
    (made / "voco_engine.json").unlink()
    assert "make the folder with voco export" in run(tmp_path, [], model=made, starts=False).log


def test_the_import_hook_of_these_engines_refuses_what_it_should() -> None:
    hook = OnlyWhatIsNeeded()
    for name in ("voco_plugin.training", "voco_plugin.serving.http", "voco_plugin.models.loading"):
        with pytest.raises(ImportError, match="is not for vLLM's environment"):
            hook.find_spec(name)
    for name in ("voco_plugin", "voco_plugin.cache.cache", "voco_plugin.models", "torch", "peft"):
        assert hook.find_spec(name) is None
    code = compile("hook.find_spec('peft')", "x", "exec")
    with pytest.raises(ImportError, match="peft is not for vLLM's environment"):
        exec(code, {"hook": hook, "__name__": "voco_plugin.cache.cache"})
