"""What a request to vLLM carries is checked one by one, blocks are kept within their bytes and moved to where
they stand. All of it without vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stores import MADE_BY, key, made, opened
from voco_plugin.cache.engine_file import EngineFile, LayerRope
from voco_plugin.cli.accelerate_launch import load_integration

bridge = load_integration("vllm")
from voco_plugin.integrations.vllm import request  # noqa: E402
from voco_plugin.integrations.vllm.blocks import BlockMemory  # noqa: E402
from voco_plugin.integrations.vllm.placing import PromptBlocks, prompt_blocks  # noqa: E402

VOCO, IMAGE = 7, 9
IDS = [1, 5, VOCO, VOCO, 4, VOCO, VOCO, VOCO, 5]
PLACED = (bridge.PlacedBlock(key(0), 2), bridge.PlacedBlock(key(1), 5))


def read(ids: list[int] | None, fields: dict[str, Any]) -> tuple:
    return request.blocks_of_request(
        ids, fields.get("kv_transfer_params"), fields.get("cache_salt"), VOCO, (IMAGE,)
    )


def test_what_a_front_makes_is_read_back() -> None:
    fields = bridge.request_fields(PLACED)
    assert read(IDS, fields) == PLACED
    assert read(IDS, bridge.request_fields(PLACED, tenant="a")) == PLACED
    assert fields["kv_transfer_params"]["voco"][0] == {"key": key(0), "at": 2, "block": 0}
    assert read([1, 5, 4], {}) == () == read([], {}) == read(None, {})
    assert read([1, 5, 4], {"cache_salt": "theirs", "kv_transfer_params": {"other": 1}}) == ()


def test_a_salt_tells_keys_their_order_and_their_blocks_apart() -> None:
    named = [[key(0)], [key(1)], [key(0), key(1)], [key(1), key(0)], [(key(0), 1)], [], [key(0), key(0)]]
    assert len({bridge.salt_of(one) for one in named}) == len(named)
    assert bridge.salt_of([key(0)]) == bridge.salt_of([(key(0), 0)])
    salts = {bridge.request_fields(PLACED, tenant)["cache_salt"] for tenant in (None, "a", "b")}
    assert len(salts) == 3


def test_a_salt_is_what_it_was() -> None:
    assert bridge.salt_of(["0" * 64]) == (
        "voco-541216cc5abe472f08ff9f685847c94cf2b8eb17787ae3361f94b0037991f509"
    ), "written down by fronts of other languages: change it with its version"


@pytest.mark.parametrize(
    ("ids", "fields", "message"),
    [
        (IDS, {}, "position 2 .* holds a VoCo token, but the request names no block"),
        (IDS, {"kv_transfer_params": {"voco": []}}, "names no block"),
        ([1, 2], bridge.request_fields(PLACED), "holds no VoCo token"),
        (None, bridge.request_fields(PLACED), "given as embeddings"),
        ([1, IMAGE], {}, "position 1 .* holds 9, the id of a vision token"),
        (IDS[:-1], bridge.request_fields(PLACED), "ends with a block"),
        (IDS, {**bridge.request_fields(PLACED), "cache_salt": None}, "cache_salt=None does not cover"),
        (IDS, {**bridge.request_fields(PLACED), "cache_salt": "x"}, "cache_salt='x' does not cover"),
        (IDS, bridge.request_fields(PLACED[::-1]), "at=2 is not after block 0 at 5"),
        (IDS, bridge.request_fields([PLACED[0], PLACED[0]]), "at=2 is not after block 0 at 2"),
        (IDS, bridge.request_fields([PLACED[0]._replace(at=4)]), "no VoCo token .* stands at 4"),
        (IDS, bridge.request_fields([PLACED[0]._replace(at=True)]), "at=True is not an integer"),
        (IDS, bridge.request_fields([PLACED[0]._replace(block=-1)]), "block=-1 is not an integer"),
        (IDS, bridge.request_fields([PLACED[0]._replace(key=key(0).upper())]), "is not a key"),
        (IDS, {"kv_transfer_params": {"voco": [{"key": key(0), "at": 2, "k": 1}]}}, "'k' is unknown"),
        (IDS, {"kv_transfer_params": {"voco": "all"}}, "voco='all' is not a list"),
        ([1, 2], {"kv_transfer_params": {"voco": 5}}, "voco=5 is not a list"),
        (IDS, {"kv_transfer_params": {"voco": [5]}}, "5 is not an object"),
        (IDS, {"kv_transfer_params": [5]}, r"kv_transfer_params=\[5\] is not an object"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(ids: Any, fields: dict, message: str) -> None:
    with pytest.raises(bridge.RequestRefused, match=message):
        read(ids, fields)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((2, 2), "block 1 .* has K=2, but 3 VoCo tokens"),
        ((3, 3), "block 0 .* has K=3, but 2 VoCo tokens"),
        ((1, 3), "block 0 .* has K=1, but 2 VoCo tokens"),
        ((2, 130), "block 1 .* has K=130, but 3 VoCo tokens"),
    ],
)
def test_every_voco_token_has_one_block(tokens: tuple[int, int], message: str) -> None:
    assert request.check_tokens(PLACED, (2, 3), IDS, VOCO) is None  # nothing raised
    with pytest.raises(bridge.RequestRefused, match=message):
        request.check_tokens(PLACED, tokens, IDS, VOCO)
    with pytest.raises(bridge.RequestRefused, match="VoCo token at 2 of the prompt has no block"):
        request.check_tokens(PLACED[1:], (3,), IDS, VOCO)


def test_blocks_that_touch_are_told_apart_by_their_places() -> None:
    ids, places = [VOCO] * 4 + [1], (bridge.PlacedBlock(key(0), 0), bridge.PlacedBlock(key(1), 1))
    assert request.check_tokens(places, (1, 3), ids, VOCO) is None  # nothing raised
    with pytest.raises(bridge.RequestRefused, match="block 0 .* has K=3, but 1"):
        request.check_tokens(places, (3, 1), ids, VOCO)
    with pytest.raises(bridge.RequestRefused, match="block 1 .* has K=1, but 3"):
        request.check_tokens(places, (1, 1), ids, VOCO)


# -- blocks
# ------------------------------------------------------------------------------------------------------------


def engine(**changed: Any) -> EngineFile:
    """What :func:`stores.made` makes blocks of."""
    values: dict[str, Any] = {
        "fingerprint": MADE_BY, "voco_id": VOCO, "image_ids": (IMAGE,), "input_only": (VOCO, IMAGE),
        "num_tokens": 2, "num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32",
        "positions": "compact", "max_positions": 1024,
        "layers": (LayerRope("halves", tuple(0.5**i for i in range(8))), LayerRope("none")),
    }  # fmt: skip
    return EngineFile(**{**values, **changed})


@pytest.fixture
def memory(tmp_path: Path) -> Any:
    """``bytes → BlockMemory`` over a store of six keys, the K of each its number and one more."""
    stores = []

    def of(max_bytes: int = 2**20) -> BlockMemory:
        with opened(tmp_path / "store") as store:
            store.put_many([(key(n), made(n, tokens=n + 1)) for n in range(6)])
        stores.append(opened(tmp_path / "store", readonly=True))
        return BlockMemory(stores[-1], max_bytes)

    yield of
    for store in stores:
        store.close()


def test_memory_holds_what_was_used_last_and_no_more_than_its_bytes(memory: Any) -> None:
    size = made(1, tokens=2).nbytes
    kept = memory(2 * size)
    for number in (0, 1, 1):
        kept.block(key(number), 0)
    assert (kept.hits, kept.misses, kept.nbytes) == (1, 2, size + size // 2)
    kept.block(key(0), 0)
    kept.block(key(1), 0)
    kept.block(key(1), 0)
    kept.block(key(0), 0)
    kept.block(key(2), 0)  # K = 3 leaves room for K = 1, which was used last
    assert kept.nbytes == 2 * size
    before = kept.misses
    kept.block(key(0), 0)
    assert kept.misses == before
    kept.block(key(1), 0)
    assert kept.misses == before + 1
    kept.block(key(5), 0)  # larger than all of it: not kept, and nothing goes
    assert kept.nbytes <= 2 * size and kept.block(key(5), 0).num_tokens == 6


def test_a_key_that_is_not_there_is_refused(memory: Any) -> None:
    with pytest.raises(bridge.RequestRefused, match="is not in store .* compress the image again"):
        memory().block(key(99), 0)
    with pytest.raises(bridge.RequestRefused, match="block 1 of key .* its cache holds 1"):
        memory().block(key(0), 1)


@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_a_prompts_blocks_stand_at_their_places_moved(max_bytes: int, memory: Any) -> None:
    placed = [bridge.PlacedBlock(key(1), 2), bridge.PlacedBlock(key(2), 5)]
    for _ in range(2):  # from the store, then from memory
        found = prompt_blocks(placed, IDS, engine(), memory(max_bytes), torch.float32)
        assert found.places == (2, 3, 5, 6, 7) and found.data.shape == (2, 2, 5, 2, 16)
        blocks = [made(1, tokens=2).blocks[0], made(2, tokens=3).blocks[0]]
        for block, at, cut in zip(blocks, (2, 5), (slice(0, 2), slice(2, 5)), strict=True):
            keys = engine().move(block.keys, at - block.position)
            for layer in range(2):
                assert torch.equal(found.data[layer, 0, cut].transpose(0, 1), keys[layer])
                assert torch.equal(found.data[layer, 1, cut].transpose(0, 1), block.values[layer])
        assert not torch.equal(found.data[0, 0, :2].transpose(0, 1), blocks[0].keys[0])


def test_a_chunk_takes_what_it_computes() -> None:
    whole = PromptBlocks((2, 3, 5, 6, 7), torch.arange(5.0).view(1, 1, 5, 1, 1))
    for size in (1, 2, 3, 5, 9):
        parts = [whole.within(start, start + size) for start in range(0, 9, size)]
        assert sum((places for places, _ in parts), ()) == whole.places
        assert torch.cat([data for _, data in parts], dim=2).flatten().tolist() == [0, 1, 2, 3, 4]
    assert whole.within(4, 5)[0] == () and whole.within(8, 9)[1].shape[2] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 32}, r"2 layers of \(2, 2, 16\) are not the model's 2 of \(2, 2, 32\)"),
        ({"num_kv_heads": 1}, "are not the model's"),
        ({"num_layers": 3}, "2 layers of"),
    ],
)
def test_blocks_of_another_shape_are_refused(changed: dict, message: str, memory: Any) -> None:
    with pytest.raises(bridge.RequestRefused, match=message):
        prompt_blocks([bridge.PlacedBlock(key(1), 1)], [1, VOCO, VOCO, 1], engine(**changed), memory(),
                      torch.float32)  # fmt: skip


def test_a_block_that_depends_on_what_stood_before_it_stays_where_it_was(tmp_path: Path) -> None:
    from dataclasses import replace

    from voco_plugin import VoCoCache

    cache = made(0)
    fixed = VoCoCache([replace(cache.blocks[0], relocatable=False)], fingerprint=cache.fingerprint)
    with opened(tmp_path / "store") as store:
        store.put(key(0), fixed)
        memory = BlockMemory(store, 2**20)
        ids = [1] * 5 + [VOCO, VOCO, 1]
        prompt_blocks([bridge.PlacedBlock(key(0), 5)], ids, engine(), memory, torch.float32)
        with pytest.raises(bridge.RequestRefused, match="made with block_context='prefix' at position 5"):
            prompt_blocks([bridge.PlacedBlock(key(0), 4)], ids[1:], engine(), memory, torch.float32)
