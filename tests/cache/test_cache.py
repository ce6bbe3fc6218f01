"""VoCoCache: saved = in memory bit for bit (contract 1), and every damaged or foreign file is refused
(contract 6).
"""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

import contracts.cache as contracts
import voco_plugin as vp
from contracts.cache import _stream, same
from harness import attached, inputs, shared
from tiny.processors import processor
from voco_plugin.cache import VoCoCacheError
from voco_plugin.cache.cache import cache_from_buffer, cache_to_bytes


@pytest.fixture
def model():
    return shared("llava_llama")


@pytest.fixture
def cache(model):
    return model.compress(**inputs("llava_llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loaded_equals_in_memory_bit_for_bit(cache, dtype, tmp_path):
    contracts.loaded_equals_in_memory_bit_for_bit(cache, dtype, tmp_path)


@torch.no_grad()
def test_loaded_gives_the_same_logits_bit_for_bit(model, cache, tmp_path):
    stream = model.stream_inputs(inputs("llava_llama"))
    cache.save(tmp_path / "x.safetensors")
    again = vp.VoCoCache.load(tmp_path / "x.safetensors")
    expected = model(**stream, voco_cache=cache).logits
    assert torch.equal(model(**stream, voco_cache=again).logits.nan_to_num(), expected.nan_to_num())


def test_an_empty_cache_is_saved_and_loaded(model, tmp_path):
    empty = model.compress(**inputs("llava_llama", [["bos", "t3"]]))
    empty.save(tmp_path / "x.safetensors")
    assert len(empty) == 0 and same(vp.VoCoCache.load(tmp_path / "x.safetensors"), empty)


def test_the_size_is_what_the_paper_says(cache):
    """2 · layers · kv_heads · head_dim · bytes a token (Sec. 4.3, Table 7)."""
    layers, heads, dim = 2, 2, 16
    assert cache.nbytes == sum(cache.num_tokens) * 2 * layers * heads * dim * 4


def test_slices_cat_stack_and_first(cache):
    assert len(cache[1:3]) == 2 and cache[-1].blocks[0] is cache.blocks[-1]
    assert [b.num_vision for b in cache[[2, 0]]] == [cache.blocks[2].num_vision, cache.blocks[0].num_vision]
    joined = vp.VoCoCache.cat([cache[:2], cache[2:]])
    assert joined.blocks == cache.blocks and joined.num_rows == 1
    stacked = vp.VoCoCache.stack([cache[:2], cache[4:]])
    assert stacked.rows == (0, 0, 1) and stacked.num_rows == 2
    assert cache[:1].first(1).num_tokens == [1]
    with pytest.raises(ValueError, match=r"first\(3\): this block has 2"):
        cache.first(3)
    with pytest.raises(ValueError, match="row"):
        vp.VoCoCache(cache.blocks, [0, 0, 0, 0, 7], 2)


@torch.no_grad()
def test_first_k_is_what_a_compression_into_k_gives(model):
    """Paper, Table 4: under causal attention the first k VoCo tokens do not know of the later ones."""
    three = model.compress(**inputs("llava_llama", [["bos", "img", "c3", "t2"]]))
    one = model.compress(**inputs("llava_llama", [["bos", "img", "c1", "t2"]]))
    for a, b in zip(
        (*three.first(1).blocks[0].keys, *three.first(1).blocks[0].values),
        (*one.blocks[0].keys, *one.blocks[0].values),
        strict=True,
    ):  # noqa: E501
        assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("where", ["header", "metadata", "data", "end"])
def test_one_changed_byte_is_found(cache, tmp_path, where):
    contracts.one_changed_byte_is_found(cache, tmp_path, where)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -64])
def test_a_truncated_file_is_named(cache, tmp_path, keep):
    path = tmp_path / "x.safetensors"
    cache.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VoCoCacheError, match="truncated|cannot be read|not a VoCo cache"):
        vp.VoCoCache.load(path)


def test_a_header_that_claims_terabytes_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 10**13) + b"{}")
    with pytest.raises(VoCoCacheError, match="claims 10000000000000"):
        vp.VoCoCache.load(path)
    body = json.dumps(
        {
            "__metadata__": {"voco": "{}", "sha256": ""},
            "layers.0.key": {"dtype": "F32", "shape": [10**12, 1, 1], "data_offsets": [0, 4 * 10**12]},
        },
        separators=(",", ":"),
    ).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + b"1234")
    with pytest.raises(VoCoCacheError, match="truncated"):
        vp.VoCoCache.load(path)


def test_another_file_or_version_is_refused(cache, tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.zeros(2)}, plain)
    with pytest.raises(VoCoCacheError, match="not a VoCo cache"):
        vp.VoCoCache.load(plain)
    with pytest.raises(FileNotFoundError):
        vp.VoCoCache.load(tmp_path / "none.safetensors")
    cache.save(tmp_path / "x.safetensors")
    from safetensors import safe_open

    with safe_open(str(tmp_path / "x.safetensors"), "pt") as stream:
        metadata, tensors = stream.metadata(), {k: stream.get_tensor(k) for k in stream.keys()}  # noqa: SIM118
    metadata["voco"] = metadata["voco"].replace('"format_version": 2', '"format_version": 8')
    save_file(tensors, tmp_path / "v.safetensors", metadata=metadata)
    with pytest.raises(VoCoCacheError, match="format version 8"):
        vp.VoCoCache.load(tmp_path / "v.safetensors")


def container(header: dict, body: bytes, separators=(",", ":")) -> bytes:
    text = json.dumps(header, separators=separators, ensure_ascii=False).encode()
    return struct.pack("<Q", len(text)) + text + body


def split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_safetensors_own_reader_reads_it_and_its_writer_is_read(cache, tmp_path):
    """The container is safetensors', not one of our own."""
    from safetensors.torch import load

    data = cache_to_bytes(cache)
    tensors = load(data)
    assert len(tensors) == 4 and tensors["layers.1.value"].shape == (sum(cache.num_tokens), 2, 16)
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0, "tensors are aligned"
    save_file(tensors, tmp_path / "x.safetensors", metadata=split(data)[0]["__metadata__"])
    assert same(vp.VoCoCache.load(tmp_path / "x.safetensors"), cache)


def test_a_header_that_says_the_same_in_other_bytes_is_refused(cache):
    """Else a byte of it could change unseen."""
    data = cache_to_bytes(cache)
    header, body = split(data)
    assert same(cache_from_buffer(container(header, body)), cache)
    with pytest.raises(VoCoCacheError, match="not written as one is"):
        cache_from_buffer(container(header, body, (", ", ":")))
    (length,) = struct.unpack("<Q", data[:8])
    for blank in b"\t", b"\n", b"\r":
        padded = struct.pack("<Q", length + 8) + data[8 : 8 + length] + b"       " + blank + body
        with pytest.raises(VoCoCacheError, match="not written as one is"):
            cache_from_buffer(padded)
    for more in ({"format": "pt"}, {"a": "b"}):
        longer = {**header, "__metadata__": {**header["__metadata__"], **more}}
        with pytest.raises(VoCoCacheError, match="holds more than a cache writes"):
            cache_from_buffer(container(longer, body))


def test_tensors_that_overlap_or_leave_gaps_are_refused(cache):
    header, body = split(cache_to_bytes(cache))
    size = header["layers.0.key"]["data_offsets"][1] - header["layers.0.key"]["data_offsets"][0]
    gap = {
        name: {**facts, "data_offsets": [o + 8 for o in facts["data_offsets"]]} if name[0] == "l" else facts
        for name, facts in header.items()
    }
    with pytest.raises(VoCoCacheError, match="overlap or leave gaps"):
        cache_from_buffer(container(gap, bytes(8) + body))
    twice = {**header, "layers.1.key": {**header["layers.1.key"], "data_offsets": [0, size]}}
    with pytest.raises(VoCoCacheError, match="overlap or leave gaps"):
        cache_from_buffer(container(twice, body))


def test_what_no_reader_would_take_is_not_written(cache):
    for wrong, message in (
        ({"fingerprint": {"model": ["a"]}}, "fingerprint is no short text"),
        ({"num_rows": 1 << 21}, "num_rows is not within"),
    ):
        made = vp.VoCoCache(cache.blocks, cache.rows, wrong.get("num_rows", 4), wrong.get("fingerprint"))
        with pytest.raises(VoCoCacheError, match=message):
            cache_to_bytes(made)
    with pytest.raises(ValueError, match="values='int4' is not known"):
        cache_to_bytes(cache, "int4")


# -- whose cache it is
# ---------------------------------------------------------------------------------------------


def test_another_models_cache_is_refused_by_name(cache):
    contracts.another_models_cache_is_refused_by_name(cache)


@torch.no_grad()
def test_another_token_row_is_another_model(cache):
    other = attached("llava_llama")
    other.get_input_embeddings().weight[vp.attachment(other).vocab.voco_id] += 1e-3
    with pytest.raises(ValueError, match="model is"):
        other(**_stream(other), voco_cache=cache)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rule": "star"}, "rule is 'isolated', not 'star'"),
        ({"positions": "sequential"}, "positions is 'compact', not 'sequential'"),
        ({"block_context": "prefix"}, "block_context is 'self', not 'prefix'"),
        ({"hide_prefix": True}, "hide_prefix is False, not True"),
    ],
)
def test_another_rules_cache_is_refused_by_name(cache, options, word):
    contracts.another_rules_cache_is_refused_by_name(cache, options, word)


@torch.no_grad()
def test_another_dtype_is_refused_by_name(model, cache):
    with pytest.raises(ValueError, match="torch.bfloat16, the model has 2 in torch.float32"):
        model(**_stream(model), voco_cache=cache.to(torch.bfloat16))


@torch.no_grad()
def test_other_processor_settings_are_refused_by_name():
    caches = []
    for mean in (0.5, 0.4):
        its = processor("llava_llama")
        its.image_processor.image_mean = [mean] * 3
        model = attached("llava_llama")
        vp.attachment(model).processor = its
        caches.append(model.compress(**inputs("llava_llama")))
    with pytest.raises(ValueError, match="processor is"):
        model(**_stream(model), voco_cache=caches[0])
    with pytest.raises(ValueError, match="cache 1 was made otherwise than the first: the processor"):
        vp.VoCoCache.cat(caches)


@torch.no_grad()
def test_a_wrong_k_or_count_is_named(model, cache):
    stream = _stream(model)
    with pytest.raises(
        ValueError,
        match=r"sample 0, position \d+: a VoCo token with no block|for block 0|VoCo tokens stand together",
    ):
        model(**stream, voco_cache=cache.first(1))
    with pytest.raises(ValueError, match="the cache holds 3 rows and input_ids 4"):
        model(**stream, voco_cache=vp.VoCoCache.stack([cache.row(r) for r in range(3)]))
    short = vp.VoCoCache(cache.blocks[1:], cache.rows[1:], 4, cache.fingerprint)
    with pytest.raises(
        ValueError, match=r"sample 0, position \d+: a VoCo token with no block for it; the cache holds 0"
    ):
        model(**stream, voco_cache=short)
    one = {k: v[:1] for k, v in stream.items()}
    with pytest.raises(
        ValueError, match=r"sample 0: the cache holds 2 block\(s\) and the prompt VoCo tokens for 1"
    ):
        model(**one, voco_cache=cache[[0, 0]])
    with pytest.raises(ValueError, match=r"1 VoCo token\(s\) for block 0, which holds 2.*cache.first\(1\)"):
        ids = inputs("llava_llama", [["bos", "img", "c1", "t2"]])
        model(**model.stream_inputs(ids), voco_cache=cache[0])


@torch.no_grad()
def test_a_stream_with_image_tokens_or_without_text_is_refused(model, cache):
    with pytest.raises(ValueError, match="sample 0, position 4: the stream holds an image token"):
        model(**{k: v for k, v in inputs("llava_llama").items() if k != "pixel_values"}, voco_cache=cache)
    batch = model.stream_inputs(inputs("llava_llama", [["img", "c2"]]))
    with pytest.raises(ValueError, match="sample 0: the prompt holds no text token"):
        model(**batch, voco_cache=cache[0])


@torch.no_grad()
def test_a_prefix_block_cannot_be_moved():
    model = shared("llava_llama", rule="prefix")
    cache = model.compress(**inputs("llava_llama", [["bos", "t3", "img", "c2", "t4"]]))
    other = model.stream_inputs(inputs("llava_llama", [["bos", "t5", "img", "c2", "t4"]]))
    with pytest.raises(
        ValueError, match="made with block_context='prefix' at position 13, so it cannot stand at 15"
    ):
        model(**other, voco_cache=cache)


@torch.no_grad()
def test_a_rope_that_cannot_be_undone_is_refused(monkeypatch):
    """The relocator believes what the layer does, not what its family is called."""
    model = attached("llava_llama")
    rotary = model.model.language_model.rotary_emb
    forward = rotary.forward

    def crooked(x, position_ids):
        cos, sin = forward(x, position_ids)
        return (cos, sin) if x.numel() == 1 else (sin, cos)

    monkeypatch.setattr(rotary, "forward", crooked)
    cache = model.compress(**inputs("llava_llama", [["bos", "t3", "img", "c2", "t4"]]))
    moved = model.stream_inputs(inputs("llava_llama", [["bos", "t9", "img", "c2", "t4"]]))
    with pytest.raises(ValueError, match="encodes positions in a way that cannot be undone"):
        model(**moved, voco_cache=cache)


@torch.no_grad()
def test_a_cache_without_fingerprint_is_refused(model, cache):
    with pytest.raises(ValueError, match="has no fingerprint"):
        model(**_stream(model), voco_cache=vp.VoCoCache(cache.blocks, cache.rows, 4))
