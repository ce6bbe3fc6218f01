"""What tests/cache/test_cache.py holds; run on broken versions too."""

from __future__ import annotations

import struct

import pytest
import torch

import voco_plugin as vp
from harness import attached, inputs
from voco_plugin.cache import VoCoCacheError


def same(a: vp.VoCoCache, b: vp.VoCoCache) -> bool:
    return (
        len(a) == len(b)
        and a.rows == b.rows
        and a.num_rows == b.num_rows
        and a.fingerprint == b.fingerprint
        and all(
            (x.position, x.extent, x.num_vision, x.relocatable)
            == (y.position, y.extent, y.num_vision, y.relocatable)
            and all(
                torch.equal(s, t) and s.dtype == t.dtype
                for s, t in zip((*x.keys, *x.values), (*y.keys, *y.values), strict=True)
            )
            for x, y in zip(a, b, strict=True)
        )
    )


def _stream(model):
    return model.stream_inputs(inputs("llava_llama"))


def loaded_equals_in_memory_bit_for_bit(cache, dtype, tmp_path):
    cache = cache.to(dtype)
    cache.save(tmp_path / "x.safetensors")
    assert same(vp.VoCoCache.load(tmp_path / "x.safetensors"), cache)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"], "no temporary file stays"


def one_changed_byte_is_found(cache, tmp_path, where):
    path = tmp_path / "x.safetensors"
    cache.save(path)
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    at = {
        "header": 12,
        "metadata": data.index(b"position") + 14,
        "data": 8 + length + 5,
        "end": len(data) - 1,
    }[where]
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(VoCoCacheError):
        vp.VoCoCache.load(path)


@torch.no_grad()
def another_models_cache_is_refused_by_name(cache):
    other = attached("llava_llama")
    other.model.language_model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    with pytest.raises(ValueError, match="the model is another one .[0-9a-f]{8}…, not [0-9a-f]{8}…"):
        other(**_stream(other), voco_cache=cache)


@torch.no_grad()
def another_rules_cache_is_refused_by_name(cache, options, word):
    other = attached("llava_llama", **options)
    with pytest.raises(ValueError, match=word):
        other(**_stream(other), voco_cache=cache)
