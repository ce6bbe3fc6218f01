"""VoCoCacheStore: what is put is found again bit for bit, only what belongs there goes in, and the limit
holds.
"""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from PIL import Image

import voco_plugin as vp
from harness import attached, inputs, shared
from stores import MADE_BY, header_of, key, made, opened, raw_put, same, tensors_of
from voco_plugin.cache import VoCoCacheError
from voco_plugin.cache.cache import cache_from_buffer, cache_from_parts, cache_to_bytes
from voco_plugin.cache.file_format import read_buffer
from voco_plugin.cache.fingerprint import fingerprint
from voco_plugin.store import image_key, quantization_error
from voco_plugin.store.names import NameEntry, StoreNames, caches_by_name
from voco_plugin.store.reader_uses import add_uses, take_uses
from voco_plugin.store.video_series import Series, all_series, write_series

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def store(tmp_path):
    with opened(tmp_path / "s") as made_store:
        yield made_store


# -- put and get
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_put_is_found_bit_for_bit(tmp_path, dtype, tokens):
    cache = made(1, tokens=tokens, dtype=dtype)
    with vp.VoCoCacheStore(tmp_path / "s", fingerprint=cache.fingerprint) as store:
        assert store.put(key(1), cache) and not store.put(key(1), cache)
        assert same(store.get(key(1)), cache) and store.get(key(1)).blocks[0].dtype == dtype
    with vp.VoCoCacheStore(tmp_path / "s", readonly=True) as store:
        assert same(store.get(key(1)), cache)


def test_what_is_found_does_not_change_with_the_store(store):
    store.put(key(1), made(1))
    found = store.get(key(1))
    store.delete([key(1)])
    store.put_many((key(n), made(n)) for n in range(2, 40))
    assert same(found, made(1))
    tensors_of(found)[0].fill_(0)  # its own memory: writing to it is allowed


def test_it_is_a_collection_of_keys(store):
    assert store.put_many((key(n), made(n)) for n in (3, 1, 3, 2)) == 3
    assert len(store) == 3 and list(store) == sorted(key(n) for n in (1, 2, 3))
    assert key(1) in store and key(4) not in store
    assert store.missing([key(5), key(1), key(4), key(5)]) == [key(5), key(4)]
    assert all(same(c, made(n)) for n, c in zip((2, 1), store.get_many([key(2), key(1)]), strict=True))
    assert store.delete([key(1), key(9)]) == 1 and key(1) not in store
    with pytest.raises(KeyError):
        store.get(key(1))


def test_iterating_goes_on_past_a_chunk_of_keys(store, monkeypatch):
    monkeypatch.setattr("voco_plugin.store.store._KEYS_AT_ONCE", 3)
    store.put_many((key(n), made(n)) for n in range(10))
    assert list(store) == sorted(key(n) for n in range(10))


@pytest.mark.parametrize("wrong", ["", "../../etc/passwd", "A" * 64, key(1)[:-1], key(1) + "0", b"x" * 32, 7])
def test_only_64_hex_digits_are_a_key(store, wrong):
    for use in (store.get, lambda k: store.put(k, made(1)), lambda k: k in store, store.missing):
        with pytest.raises(VoCoCacheError, match="is no key"):
            use([wrong] if use == store.missing else wrong)


def test_all_of_a_put_many_or_nothing(store):
    foreign = vp.VoCoCache(made(2).blocks, fingerprint={**MADE_BY, "model": "x" * 32})
    with pytest.raises(VoCoCacheError, match="model is"):
        store.put_many([(key(1), made(1)), (key(2), foreign)])
    assert len(store) == 0 and store.verify()["bad"] == []


# -- whose store it is
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "adapter", "processor", "rule", "positions", "dtype"])
def test_a_store_of_another_maker_is_refused_by_name(tmp_path, name):
    opened(tmp_path / "s").close()
    other = {**MADE_BY, name: "other"}
    said = f"made otherwise; use another folder .*: {name} is 'other', not '{MADE_BY[name]}'"
    with pytest.raises(VoCoCacheError, match=said):
        vp.VoCoCacheStore(tmp_path / "s", fingerprint=other)
    with opened(tmp_path / "s") as store, pytest.raises(VoCoCacheError, match=f"{name} is 'other'"):
        store.put(key(1), vp.VoCoCache(made(1).blocks, fingerprint=other))


def test_k_may_differ(tmp_path):
    with opened(tmp_path / "s"):
        pass
    with vp.VoCoCacheStore(tmp_path / "s", fingerprint={**MADE_BY, "num_tokens": 7}) as store:
        assert store.put(key(1), made(1)) and store.fingerprint["num_tokens"] == 7


def test_a_cache_of_another_k_than_its_key_is_refused(store):
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    one, two = store.key_of(picture, 1), store.key_of(picture)
    for put in (lambda: store.put(one, made(1)), lambda: store.put_many([(two, made(1, tokens=1))])):
        with pytest.raises(VoCoCacheError, match=r"has blocks of K=[12], its key is that of K=[12]"):
            put()
    assert len(store) == 0
    assert store.put(one, made(1, tokens=1)) and store.put(two, made(1))
    raw_put(store, one, cache_to_bytes(made(1)))  # as a program without this check could
    with pytest.raises(VoCoCacheError, match="its key is that of K=1"):
        store.get(one)
    with StoreNames(store.path) as names:
        names.put_many([NameEntry("a", 1, two)])
    with pytest.raises(VoCoCacheError, match="'a' is named with K=1, its cache has K=2"):
        caches_by_name(store, ["a"], 1)


def test_a_cache_without_fingerprint_is_refused(store):
    with pytest.raises(VoCoCacheError, match="has no fingerprint"):
        store.put(key(1), vp.VoCoCache(made(1).blocks))


def test_a_record_of_another_maker_is_refused_when_read(store):
    foreign = vp.VoCoCache(made(1).blocks, fingerprint={**MADE_BY, "model": "x" * 32})
    store.put(key(1), made(1))
    raw_put(store, key(1), cache_to_bytes(foreign))
    with pytest.raises(VoCoCacheError, match=f"record {key(1)} of store .* is not of store .*model is"):
        store.get(key(1))


def test_a_prefix_lms_store_learns_how_it_attends_and_keeps_to_it(store):
    def of(seed, attention):
        return vp.VoCoCache(made(seed).blocks, fingerprint={**MADE_BY, "attention": attention})

    before = opened(store.path)
    store.put(key(1), of(1, "prefix"))
    assert store.stat()["fingerprint"]["attention"] == "prefix"
    for one in (store, before):  # the other one was opened when nobody knew
        with pytest.raises(VoCoCacheError, match="attention is 'causal', not 'prefix'"):
            one.put(key(2), of(2, "causal"))
    before.close()


def test_two_stores_are_told_apart(tmp_path):
    with opened(tmp_path / "a") as a, opened(tmp_path / "b") as b:
        a.put(key(1), made(1))
        assert key(1) in a and key(1) not in b


# -- keys
# -----------------------------------------------------------------------------------------------------


def test_a_key_is_of_pixels_maker_and_k_and_nothing_else(tmp_path, store):
    image = Image.radial_gradient("L").convert("RGB").resize((20, 12))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "another name.bmp")
    first = store.key_of(image)
    assert len(first) == 64 and first == store.key_of(tmp_path / "a.png")
    assert first == store.key_of(str(tmp_path / "another name.bmp")) == image_key(image, MADE_BY)
    assert first == store.key_of(image, 2) == image_key(image, {**MADE_BY, "num_tokens": 5}, 2)
    changed = image.copy()
    changed.putpixel((3, 3), (1, 2, 3))
    others = [store.key_of(changed), store.key_of(image, 3)]
    others += [store.key_of(Image.frombytes("RGB", (12, 20), image.tobytes()))]
    others += [image_key(image, {**MADE_BY, name: "other"}) for name in MADE_BY if name != "num_tokens"]
    assert len({first, *others}) == 1 + len(others)
    with vp.VoCoCacheStore(store.path) as plain, pytest.raises(ValueError, match="num_tokens=None"):
        plain.key_of(image)


@torch.no_grad()
def test_for_model_is_bound_to_its_weights_and_rule(tmp_path):
    model = attached("llava_llama")
    cache = model.compress(**inputs("llava_llama"))
    with vp.VoCoCacheStore.for_model(tmp_path / "s", model) as store:
        state = vp.attachment(model)
        expected = fingerprint(model, state.config, state.processor, state.vocab.voco_id)
        assert store.fingerprint == expected and store.put(key(1), cache)
        stream = model.stream_inputs(inputs("llava_llama"))
        a = model(**stream, voco_cache=cache).logits
        b = model(**stream, voco_cache=store.get(key(1))).logits
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    model.get_input_embeddings().weight[vp.attachment(model).vocab.voco_id] += 1
    with pytest.raises(VoCoCacheError, match="model is"):
        vp.VoCoCacheStore.for_model(tmp_path / "s", model)
    with pytest.raises(VoCoCacheError, match="rule is 'star', not 'isolated'"):
        vp.VoCoCacheStore.for_model(tmp_path / "s", attached("llava_llama", rule="star"))
    with pytest.raises(ValueError, match="no VoCo attached"):
        vp.VoCoCacheStore.for_model(tmp_path / "t", torch.nn.Linear(1, 1))


def test_for_model_sees_through_wrappers(tmp_path):
    model = shared("llava_llama")
    wrapped = torch.nn.ModuleDict({"module": model})
    with vp.VoCoCacheStore.for_model(tmp_path / "s", model) as a:
        with vp.VoCoCacheStore.for_model(tmp_path / "s", wrapped) as b:
            assert a.fingerprint == b.fingerprint


# -- views
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_view_lies_in_the_memory_map(tmp_path, dtype, tokens):
    cache = made(1, tokens=tokens, layers=3, dim=128, dtype=dtype)
    with vp.VoCoCacheStore(tmp_path / "s", fingerprint=cache.fingerprint) as store:
        store.put(key(1), cache)
        with store.view() as view, warnings.catch_warnings():
            warnings.simplefilter("error")
            found = view[key(1)]
            assert same(found, cache) and view.copied == 0
            begin, end = map_of(store)
            assert all(begin <= t.data_ptr() < end for t in tensors_of(found))
        begin, end = map_of(store)
        assert not any(begin <= t.data_ptr() < end for t in tensors_of(store.get(key(1))))


def map_of(store) -> tuple[int, int]:
    """Where the store's file lies in this process's memory, as the kernel has it."""
    file = str(store.path / "data.mdb")
    with open("/proc/self/maps") as stream:
        spans = [line.split()[0] for line in stream if line.rstrip().endswith(file)]
    return tuple(int(part, 16) for part in spans[0].split("-"))


def test_a_misaligned_record_is_copied_and_counted():
    data = cache_to_bytes(made(1))
    memory = bytearray(len(data) + 64)
    for offset in (0, 8, 1, 2):
        memory[offset : offset + len(data)] = data
        parts = read_buffer(memoryview(memory)[offset : offset + len(data)], "x", copy=False)
        aligned = (torch.frombuffer(memory, dtype=torch.uint8).data_ptr() + offset) % 4 == 0
        assert same(cache_from_parts(parts), made(1)) and parts.copied == (0 if aligned else 4)


def test_a_buffer_read_without_copies_is_kept_alive():
    found = cache_from_buffer(cache_to_bytes(made(1)), copy=False)
    junk = [bytes(4000) for _ in range(100)]
    assert same(found, made(1)) and junk


def test_a_view_is_a_snapshot_and_ends_with_its_block(store):
    store.put(key(1), made(1))
    with store.view() as view:
        store.put(key(2), made(2))
        store.delete([key(1)])
        assert same(view[key(1)], made(1))
        with pytest.raises(KeyError):
            view[key(2)]
        with pytest.raises(VoCoCacheError, match="cannot be closed while a view of it is open"):
            store.close()
    with pytest.raises(VoCoCacheError, match="has ended"):
        view[key(1)]
    assert key(2) in store and key(1) not in store


# -- the limit
# ------------------------------------------------------------------------------------------------

SIZE = len(cache_to_bytes(made(0)))


def test_those_used_longest_ago_make_room(tmp_path):
    with opened(tmp_path / "s", max_bytes=3 * SIZE) as store:
        for n in (1, 2, 3):
            store.put(key(n), made(n))
        store.get(key(1))
        store.put(key(4), made(4))
        assert set(store) == {key(n) for n in (1, 3, 4)}
        with store.view() as view:
            view[key(3)]
        store.put(key(1), made(1))  # there already: used
        store.put(key(5), made(5))
        assert set(store) == {key(n) for n in (1, 3, 5)}
        assert store.stat()["bytes"] == 3 * SIZE and store.verify() == {
            "records": 3, "bytes": 3 * SIZE, "bad": [], "index": [],
        }  # fmt: skip


def test_what_was_used_is_remembered_by_the_next_process(tmp_path):
    with opened(tmp_path / "s", max_bytes=3 * SIZE) as store:
        store.put_many((key(n), made(n)) for n in (1, 2, 3))
    with opened(tmp_path / "s") as store:
        store.get(key(1))
    with opened(tmp_path / "s") as store:
        assert store.max_bytes == 3 * SIZE
        store.put(key(4), made(4))
        assert set(store) == {key(n) for n in (1, 3, 4)}


def test_what_a_reader_used_that_does_not_write_is_used(tmp_path):
    with opened(tmp_path / "s", max_bytes=3 * SIZE) as store:
        store.put_many((key(n), made(n)) for n in (1, 2, 3))
    with vp.VoCoCacheStore(tmp_path / "s", readonly=True) as reader:
        reader.get(key(1))
    with vp.VoCoCacheStore(tmp_path / "s", readonly=True) as reader, reader.view() as view:
        view[key(2)]
    with vp.VoCoCacheStore(tmp_path / "s", readonly=True, lock=False) as reader:
        reader.get(key(3))  # without a lock nothing is written into the folder
    with opened(tmp_path / "s") as store:
        store.put(key(4), made(4))
        assert set(store) == {key(n) for n in (1, 2, 4)}
        store.put(key(5), made(5))
        assert set(store) == {key(n) for n in (2, 4, 5)}, "taken in once, and before what was put since"


def test_uses_of_readers_stay_within_bounds_and_damage_costs_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("voco_plugin.store.reader_uses._KEPT", 4)
    (tmp_path / "data.mdb").touch()
    keys = [bytes.fromhex(key(n)) for n in range(30)]
    for one in keys:
        add_uses(tmp_path, [one])
    assert (tmp_path / "uses.txt").stat().st_size <= 66 * 10
    with open(tmp_path / "uses.txt", "ab") as stream:
        stream.write(b"a line that was cut")
    add_uses(tmp_path, keys[:1])
    found = take_uses(tmp_path)
    assert found[-1] == keys[0] and found[-5:-1] == keys[26:] and take_uses(tmp_path) == []


def test_reading_writes_in_batches_only(store, monkeypatch):
    store.put_many((key(n), made(n)) for n in range(8))
    monkeypatch.setattr("voco_plugin.store.recency.BATCH", 6)

    def last_transaction():
        return store._env.env.info()["last_txnid"]

    before = last_transaction()
    for n in range(5):
        store.get(key(n))
        store.get(key(n))
    assert last_transaction() == before
    store.get(key(5))
    assert last_transaction() == before + 1
    with vp.VoCoCacheStore(store.path, readonly=True) as reader:
        reader.get_many([key(n) for n in range(8)])
    assert last_transaction() == before + 1, "a reader that may not write does not"


def test_what_the_limit_cannot_hold_is_refused_by_name(tmp_path):
    with opened(tmp_path / "s", max_bytes=2 * SIZE) as store:
        store.put(key(1), made(1))
        with pytest.raises(
            VoCoCacheError, match=rf"record {key(2)} takes \d+ bytes, more than the max_bytes"
        ):
            store.put(key(2), made(2, tokens=9))
        with pytest.raises(VoCoCacheError, match="3 records of one put_many take"):
            store.put_many((key(n), made(n)) for n in (2, 3, 4))
        assert list(store) == [key(1)]
        assert store.put_many((key(n), made(n)) for n in (2, 3)) == 2
        assert store.put_many((key(n), made(n)) for n in (2, 4)) == 1, "2 is the oldest, but given again"
        assert set(store) == {key(2), key(4)}


def test_a_lower_limit_makes_room_at_once_and_prune_once(tmp_path):
    with opened(tmp_path / "s") as store:
        store.put_many((key(n), made(n)) for n in range(6))
        with opened(tmp_path / "s", max_bytes=4 * SIZE):
            assert set(store) == {key(n) for n in (2, 3, 4, 5)}
        assert store.prune(SIZE) == 3 and list(store) == [key(5)]
        assert store.prune(0) == 1 and len(store) == 0
        assert store.stat()["bytes"] == 0 and store.stat()["max_bytes"] == 4 * SIZE


def test_what_is_put_again_is_used_again(store):
    store.put_many((key(n), made(n)) for n in (1, 2, 3))
    store.put(key(1), made(1))
    store.prune(2 * SIZE)
    assert set(store) == {key(1), key(3)}


def test_freed_room_is_used_again(tmp_path):
    """A hundred times the limit is put; the file stays within the limit and what one transaction needs."""
    big = made(0, tokens=4, layers=4, dim=128)
    size = len(cache_to_bytes(big))
    with opened(tmp_path / "s", max_bytes=10 * size) as store:
        for n in range(300):
            store.put(key(n), big)
        assert store.stat()["bytes"] == 10 * size
        assert (tmp_path / "s" / "data.mdb").stat().st_size < 16 * size


# -- opening
# ----------------------------------------------------------------------------------------------------


def test_the_map_grows(tmp_path):
    with opened(tmp_path / "s", map_size=1 << 17) as store:
        for n in range(50):
            store.put(key(n), made(n, tokens=8))
        assert store.stat()["map_size"] > 1 << 17 and store.verify()["records"] == 50
        assert all(same(store.get(key(n)), made(n, tokens=8)) for n in range(50))


def test_the_map_cannot_grow_below_a_view(tmp_path):
    with opened(tmp_path / "s", map_size=1 << 17) as store:
        store.put(key(0), made(0))
        with store.view() as view:
            found = view[key(0)]
            with pytest.raises(VoCoCacheError, match="must be grown, but this thread has a view of it open"):
                store.put_many((key(n), made(n, tokens=64)) for n in range(1, 20))
            assert same(found, made(0))
        assert store.put_many((key(n), made(n, tokens=64)) for n in range(1, 20)) == 19


def test_one_folder_opened_twice_is_one_environment(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "s")
    with opened(tmp_path / "s") as a, opened(tmp_path / "link") as b:
        a.put(key(1), made(1))
        assert same(b.get(key(1)), made(1)) and a._env is b._env
    with opened(tmp_path / "s") as a:
        assert key(1) in a


def test_a_reader_first_does_not_hinder_a_writer(tmp_path):
    opened(tmp_path / "s").close()
    with vp.VoCoCacheStore(tmp_path / "s", readonly=True) as reader, opened(tmp_path / "s") as writer:
        writer.put(key(1), made(1))
        assert same(reader.get(key(1)), made(1))
        for write in (
            lambda: reader.put(key(2), made(2)), lambda: reader.prune(0), lambda: reader.delete([key(1)])
        ):  # fmt: skip
            with pytest.raises(PermissionError, match="readonly=True"):
                write()


def test_a_closed_store_says_so(tmp_path):
    store = opened(tmp_path / "s")
    store.close()
    store.close()
    with pytest.raises(VoCoCacheError, match="is closed"):
        len(store)


def test_a_pickled_store_opens_its_folder_again(store):
    store.put(key(1), made(1))
    with pickle.loads(pickle.dumps(store)) as again:
        assert same(again.get(key(1)), made(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "int4"}, "values='int4' is not known"),
        ({"values": "int8"}, "has values='keep', not 'int8'"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"max_bytes": 1, "readonly": True}, "leave max_bytes out"),
        ({"lock": False}, "add readonly=True"),
    ],
)
def test_what_a_user_gets_wrong_is_named(tmp_path, options, message):
    opened(tmp_path / "s").close()
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "s", **options)


# -- 8 bits
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 16), (3, 40), (2, 128)])
def test_8_bits_are_within_half_a_step_in_the_models_dtype(tmp_path, dtype, tokens, dim):
    cache = made(1, tokens=tokens, dim=dim, dtype=dtype)
    with vp.VoCoCacheStore(tmp_path / "s", fingerprint=cache.fingerprint, values="int8") as store:
        store.put(key(1), cache)
        found = store.get(key(1))
        assert found.fingerprint == cache.fingerprint and found.blocks[0].dtype == dtype
        unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 2**-20)
        for a, b in zip(tensors_of(cache), tensors_of(found), strict=True):
            a, b = a.double(), b.double()
            groups = torch.nn.functional.pad(a, (0, -dim % 16)).unflatten(-1, (-1, 16)).abs().amax(-1)
            step = groups.repeat_interleave(16, -1)[..., :dim] / 127 * (1 + 2**-7)  # scales rounded up
            assert bool(((a - b).abs() <= step / 2 + b.abs() * unit).all())
        header, _ = header_of(cache_to_bytes(cache, "int8"))
        stored = sum(
            v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"
        )
        values = sum(t.numel() for t in tensors_of(cache))
        assert stored == values + 2 * values // dim * -(-dim // 16)
        with store.view() as view:
            assert same(view[key(1)], found) and view.copied == 4


def test_8_bits_keep_zeros_and_refuse_what_is_not_finite(tmp_path):
    with opened(tmp_path / "s", values="int8") as store:
        zeros = made(1)
        for tensor in tensors_of(zeros):
            tensor[:, :1] = 0
        store.put(key(1), zeros)
        assert all(bool((t[:, :1] == 0).all()) for t in tensors_of(store.get(key(1))))
        tensors_of(zeros)[3][0, 0, 0] = float("inf")
        with pytest.raises(VoCoCacheError, match=r"layers.1.value holds values that are not finite"):
            store.put(key(2), zeros)


@torch.no_grad()
def test_the_error_of_8_bits_is_measured_and_kept(tmp_path):
    model = shared("llava_llama")
    cache = model.compress(**inputs("llava_llama"))
    stream = model.stream_inputs(inputs("llava_llama"))
    error = quantization_error(model, stream, cache)
    quantized = cache_from_buffer(cache_to_bytes(cache, "int8"))
    kinds = stream["attention_mask"].bool() & (stream["input_ids"] != vp.attachment(model).vocab.voco_id)
    a = model(**stream, voco_cache=cache).logits[kinds]
    b = model(**stream, voco_cache=quantized).logits[kinds]
    assert error["max_abs_logit"] == float((a - b).abs().max()) > 0
    assert error["max_abs_logit"] < 0.2 * error["logit_std"] and error["greedy_agreement"] > 0.8
    assert error["tokens"] == 4 + 6 + 2 and error["prompts"] == 3, "text before an image sees no block"
    with vp.VoCoCacheStore.for_model(tmp_path / "s", model, values="int8") as store:
        assert store.stat()["error"] is None
        store.note_error(error)
    with vp.VoCoCacheStore.for_model(tmp_path / "s", model) as store:
        assert store.stat()["error"] == error and store.values == "int8"
    with pytest.raises(ValueError, match="no text token stands after a block"):
        text = {k: v[2:3] for k, v in stream.items()}
        quantization_error(model, text, cache.row(2))


# -- files in and out
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_exported_and_imported_is_the_same_bytes(tmp_path, values):
    with opened(tmp_path / "s", values=values) as store:
        store.put_many((key(n), made(n)) for n in range(5))
        assert store.export(tmp_path / "files") == 5
        assert store.export(tmp_path / "one", [key(3)]) == 1
        assert same(vp.VoCoCache.load(tmp_path / "files" / f"{key(3)}.safetensors"), store.get(key(3)))
        with pytest.raises(KeyError):
            store.export(tmp_path / "one", [key(7)])
        with opened(tmp_path / "t", values=values) as other:
            assert other.import_(tmp_path / "one") == 1 and other.import_(tmp_path / "files") == 4
            assert list(other) == list(store)
            assert all(same(other.get(k), store.get(k)) for k in store)
            other.export(tmp_path / "again")
    for file in (tmp_path / "files").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_keep_is_the_file_that_save_writes(tmp_path, store):
    store.put(key(1), made(1, blocks=3))
    store.export(tmp_path)
    made(1, blocks=3).save(tmp_path / "x.safetensors")
    assert (tmp_path / f"{key(1)}.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_only_what_belongs_there_is_imported(tmp_path, store):
    files = tmp_path / "files"
    files.mkdir()
    with pytest.raises(VoCoCacheError, match="holds no .safetensors file"):
        store.import_(files)
    made(1).save(files / "cat.safetensors")
    with pytest.raises(VoCoCacheError, match="cat.safetensors is not named by a key"):
        store.import_(files)
    (files / "cat.safetensors").rename(files / f"{key(1)}.safetensors")
    vp.VoCoCache(made(2).blocks, fingerprint={**MADE_BY, "rule": "star"}).save(
        files / f"{'f' * 64}.safetensors"
    )
    with pytest.raises(VoCoCacheError, match="rule is 'star'"):
        store.import_(files)
    (files / f"{'f' * 64}.safetensors").write_bytes(cache_to_bytes(made(2), "int8"))
    with pytest.raises(VoCoCacheError, match="has values='int8'"):
        store.import_(files)
    (files / f"{'f' * 64}.safetensors").write_bytes(b"junk of some length")
    with pytest.raises(VoCoCacheError, match="truncated or not a cache"):
        store.import_(files)
    with pytest.raises(FileNotFoundError):
        store.import_(tmp_path / "none")
    assert len(store) == 0


def test_names_and_videos_travel_with_the_records(tmp_path, store):
    store.put_many((key(n), made(n)) for n in range(4))
    odd = "a\udcff/\u2028 b.png"  # a name of bytes that are no text, and what looks like the end of a line
    images = [NameEntry(odd, 2, key(0), "7"), NameEntry("f0", 2, key(1)), NameEntry("f1", 2, key(2))]
    with StoreNames(store.path) as names:
        names.put_many([*images, NameEntry("gone", 2, key(9))])
    video = Series("v.mp4", 2, ("f0", "f1"), (0.0, 0.5), "2 fps")
    write_series(store.path, video)
    store.export(tmp_path / "files")
    store.export(tmp_path / "part", [key(0), key(1)])
    with opened(tmp_path / "t") as other:
        other.import_(tmp_path / "files")
        with StoreNames(other.path) as names:
            assert sorted(names, key=lambda e: e.name) == sorted(images, key=lambda e: e.name)
        assert list(all_series(other.path)) == [video]
        assert same(caches_by_name(other, [odd], 2)[0], made(0))
        assert len(caches_by_name(other, ["v.mp4"], 2)[0]) == 2
    with opened(tmp_path / "u") as other:
        assert other.import_(tmp_path / "part") == 2
        with StoreNames(other.path) as names:
            assert {e.name for e in names} == {odd, "f0"} and not list(all_series(other.path))


def test_names_that_are_taken_damaged_or_of_another_k_are_not_imported(tmp_path, store):
    store.put_many((key(n), made(n)) for n in range(2))
    with StoreNames(store.path) as names:
        names.put_many([NameEntry("a", 2, key(0)), NameEntry("b", 2, key(1))])
    store.export(tmp_path / "files")
    file = tmp_path / "files" / "names.jsonl"
    with opened(tmp_path / "t") as other:
        other.put(key(7), made(7))
        with StoreNames(other.path) as names:
            names.put_many([NameEntry("a", 2, key(7))])
        with pytest.warns(UserWarning, match=r"1 name\(s\) stand for something else .* 'a' first"):
            other.import_(tmp_path / "files")
        assert same(caches_by_name(other, ["a"], 2)[0], made(7))
        assert same(caches_by_name(other, ["b"], 2)[0], made(1))
    whole = file.read_text()
    for number, (change, said) in enumerate({
        '{"name": 1}\n': "line 1, is no name of an image",
        '{"name": "x", "num_tokens": 2, "key": "../x", "stamp": null}\n': "line 1, is no name of an image",
        "[1]\n": "is no file of names",
        "junk\n": "is no file of names",
        whole.replace('"num_tokens": 2', '"num_tokens": 1'): "'a' is named with K=1, its cache has K=2",
    }.items()):  # fmt: skip
        file.write_text(change)
        with opened(tmp_path / f"u{number}") as other, pytest.raises(VoCoCacheError, match=said):
            other.import_(tmp_path / "files")


def test_an_import_keeps_to_the_limit(tmp_path, store):
    store.put_many((key(n), made(n)) for n in range(9))
    store.export(tmp_path / "files")
    with opened(tmp_path / "t", max_bytes=3 * SIZE) as small:
        assert small.import_(tmp_path / "files") == 9
        assert list(small) == sorted(store)[-3:]
