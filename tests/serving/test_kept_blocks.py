"""A server's blocks: compressed once however many ask, kept, found again by key, and what goes wrong is one
request's.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch
from PIL import Image

import voco_plugin as vp
from sessions import made, pictures
from voco_plugin.data.images import BadImageError
from voco_plugin.inference.answering import compress_images
from voco_plugin.serving import kept_blocks
from voco_plugin.serving.blocks import UnknownKeyError
from voco_plugin.serving.engines.request import EngineError
from voco_plugin.serving.kept_blocks import KeptBlocks
from voco_plugin.store.store import VoCoCacheStore
from voco_plugin.video.frames import Frame


@pytest.fixture(scope="module")
def pair():
    return made("llava_llama")


@contextlib.contextmanager
def running(pair, **options):
    blocks = KeptBlocks(*pair, **options)
    blocks.start()
    try:
        yield blocks
    finally:
        blocks.stop()


@pytest.fixture()
def batches(monkeypatch):
    """How many images each forward of stage 1 had."""
    sizes = []
    real = kept_blocks.compress_images

    def counted(model, processor, images, **options):
        sizes.append(len(images))
        return real(model, processor, images, **options)

    monkeypatch.setattr(kept_blocks, "compress_images", counted)
    return sizes


def same(a, b) -> bool:
    return all(
        torch.allclose(x, y, atol=1e-5)
        for one, other in zip(a, b, strict=True)
        for x, y in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True)
    )


def test_many_who_wait_are_compressed_together_and_each_gets_its_own(pair, batches):
    shown = pictures(6)
    wanted = list(compress_images(*pair, shown))

    async def ask(blocks):
        return await asyncio.gather(*(blocks.of_image(shown[i % 6]) for i in range(18)))

    with running(pair, batch_size=4) as blocks:
        found = asyncio.run(ask(blocks))
        assert all(same(found[i].cache, wanted[i % 6]) for i in range(18))
        assert not same(wanted[0], wanted[1]), "the images must matter"
        assert sum(batches) == 6 and max(batches) <= 4 and len(batches) < 6
        again = asyncio.run(ask(blocks))
        assert sum(batches) == 6 and all(one.hit for one in again)
        assert [one.key for one in again] == [one.key for one in found]
        state = blocks.state()
        assert state["waiting"] == 0 and state["hits"] == 18 and state["misses"] == 18
        assert state["kept_bytes"] == sum(cache.nbytes for cache in wanted)
        named = asyncio.run(blocks.of_key(found[2].key))
        assert same(named.cache, wanted[2]) and named.keys == (found[2].key,)


def test_each_k_is_a_key_of_its_own(pair):
    (shown,) = pictures(1)

    async def ask(blocks):
        return await asyncio.gather(*(blocks.of_image(shown, k) for k in (1, 3, None)))

    with running(pair) as blocks:
        found = asyncio.run(ask(blocks))
        assert [one.cache.num_tokens for one in found] == [[1], [3], [2]] and blocks.num_tokens == 2
        assert len({one.key for one in found}) == 3


def test_a_store_is_read_and_written(pair, tmp_path, batches):
    shown = pictures(2)
    with VoCoCacheStore.for_model(tmp_path / "store", pair[0]) as store:
        with running(pair, store=store) as blocks:
            first = asyncio.run(blocks.of_image(shown[0]))
            assert first.key in store and not first.hit and first.key == store.key_of(shown[0])
        with running(pair, store=store) as blocks:  # another server on it
            assert asyncio.run(blocks.of_image(shown[0])).hit and sum(batches) == 1
            assert asyncio.run(blocks.of_key(first.key)).hit
    with VoCoCacheStore.for_model(tmp_path / "store", pair[0], readonly=True) as store:
        with running(pair, store=store) as blocks:
            assert asyncio.run(blocks.of_image(shown[0])).hit
            second = asyncio.run(blocks.of_image(shown[1]))
            assert second.key not in store and asyncio.run(blocks.of_image(shown[1])).hit


def test_memory_is_bounded_and_the_store_has_the_rest(pair, tmp_path, batches):
    shown = pictures(6)
    with VoCoCacheStore.for_model(tmp_path / "store", pair[0]) as store:
        one = next(iter(compress_images(*pair, shown[:1]))).nbytes
        batches.clear()
        with running(pair, store=store, memory_bytes=2 * one) as blocks:
            for image in shown:
                asyncio.run(blocks.of_image(image))
            assert len(blocks._memory) == 2 and blocks.state()["kept_bytes"] == 2 * one
            assert asyncio.run(blocks.of_image(shown[0])).hit and sum(batches) == 6


def test_a_store_that_takes_nothing_is_said_and_the_answer_is_given(pair, tmp_path, monkeypatch, caplog):
    (shown,) = pictures(1)
    with VoCoCacheStore.for_model(tmp_path / "store", pair[0]) as store:

        def full(key, cache):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store, "put", full)
        with running(pair, store=store) as blocks:
            found = asyncio.run(blocks.of_image(shown))
            assert found.cache.num_tokens == [2] and blocks.state()["not_stored"] == 1
            assert "No space left" in caplog.text
            assert asyncio.run(blocks.of_key(found.key)).hit


def test_a_store_that_was_pruned_makes_it_anew(pair, tmp_path):
    (shown,) = pictures(1)
    with VoCoCacheStore.for_model(tmp_path / "store", pair[0]) as store:
        with running(pair, store=store, memory_bytes=0) as blocks:
            found = asyncio.run(blocks.of_image(shown))
            store.prune(0)
            blocks._memory.clear()
            with pytest.raises(UnknownKeyError, match="compress the image again"):
                asyncio.run(blocks.of_key(found.key))
            again = asyncio.run(blocks.of_image(shown))
            assert again.key == found.key and not again.hit and same(again.cache, found.cache)


def test_a_bad_image_fails_alone(pair, monkeypatch):
    good = pictures(3)
    real = kept_blocks.compress_images

    def picky(model, processor, images, **options):
        if any(image.size == (3, 3) for image in images):
            raise RuntimeError("kernel says no")
        return real(model, processor, images, **options)

    monkeypatch.setattr(kept_blocks, "compress_images", picky)

    async def ask(blocks):
        asked = [*good, Image.new("RGB", (3, 3))]
        return await asyncio.gather(*(blocks.of_image(image) for image in asked), return_exceptions=True)

    with running(pair) as blocks:
        found = asyncio.run(ask(blocks))
        assert all(one.cache.num_tokens == [2] for one in found[:3])
        assert isinstance(found[3], EngineError) and "kernel says no" in str(found[3])
        with pytest.raises(ValueError, match="num_tokens"):
            asyncio.run(blocks.of_image(good[0], 0))
        assert asyncio.run(blocks.of_image(good[0])).hit


def test_what_waits_when_it_stops_is_told(pair):
    blocks = KeptBlocks(*pair)
    (shown,) = pictures(1)
    with pytest.raises(EngineError, match="stopping"):
        asyncio.run(blocks.of_image(shown))
    blocks.start()
    blocks.stop()
    blocks.stop()
    with pytest.raises(EngineError, match="stopping"):
        asyncio.run(blocks.of_image(shown))


def test_whatever_fails_the_next_image_is_compressed(pair, monkeypatch):
    first, second = pictures(2)
    with running(pair) as blocks:
        monkeypatch.setattr(blocks, "_remember", lambda *a: 1 / 0)
        with pytest.raises(EngineError, match="division by zero"):
            asyncio.run(blocks.of_image(first))
        monkeypatch.undo()
        assert asyncio.run(blocks.of_image(second)).cache.num_tokens == [2]
        assert asyncio.run(blocks.of_image(first)).cache.num_tokens == [2]


def test_stopping_does_not_wait_for_a_forward_without_end(pair, monkeypatch):
    import threading
    import time

    release = threading.Event()
    monkeypatch.setattr(kept_blocks, "compress_images", lambda *a, **k: release.wait(30) and [])
    blocks = KeptBlocks(*pair, stop_seconds=0.2)
    blocks.start()

    async def ask():
        asked = asyncio.ensure_future(blocks.of_image(pictures(1)[0]))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(blocks.stop)
        return await asyncio.gather(asked, return_exceptions=True)

    start = time.monotonic()
    (found,) = asyncio.run(ask())
    assert isinstance(found, EngineError) and "before this image was compressed" in str(found)
    assert time.monotonic() - start < 5
    release.set()


def test_a_video_is_a_key_too(pair, tmp_path, batches):
    frames = [Frame(image, float(number), number) for number, image in enumerate(pictures(3))]
    with VoCoCacheStore.for_model(tmp_path / "store", pair[0]) as store:
        with running(pair, store=store, times=True) as blocks:
            found = asyncio.run(blocks.of_video(frames))
            assert len(found.cache) == 3 == len(found.keys) and found.times == ("<0.0s>", "<1.0s>", "<2.0s>")
            with pytest.raises(BadImageError, match="no frames"):
                asyncio.run(blocks.of_video([]))
        with running(pair, store=store) as blocks:
            again = asyncio.run(blocks.of_key(found.key))
            assert again.keys == found.keys and same(again.cache, found.cache)
            assert again.times == (None, None, None) and sum(batches) == 3
            store.delete(found.keys[1:2])
            blocks._memory.clear()
            with pytest.raises(UnknownKeyError, match="no longer kept"):
                asyncio.run(blocks.of_key(found.key))
            (tmp_path / "store" / "videos" / f"{found.key}.json").write_text("{")
            with pytest.raises(UnknownKeyError):
                asyncio.run(blocks.of_key(found.key))


@pytest.mark.parametrize("key", ["", "x", "../../etc/passwd", "a" * 63, "A" * 64, "é" * 64])
def test_a_key_that_is_none_is_refused(pair, key):
    with running(pair) as blocks, pytest.raises(ValueError, match="64 hex digits"):
        asyncio.run(blocks.of_key(key))


def test_it_is_the_store_of_its_model_alone(pair, tmp_path):
    other = made("llava_qwen2")
    VoCoCacheStore.for_model(tmp_path / "store", other[0]).close()
    with pytest.raises(vp.cache.VoCoCacheError):
        VoCoCacheStore.for_model(tmp_path / "store", pair[0])
