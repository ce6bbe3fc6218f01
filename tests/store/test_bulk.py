"""The stage over many images: every image once, nothing computed twice, the same caches as one by one.

Killed runs, several processes: ``test_bulk_processes.py``. Ray: ``test_ray.py``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image as PILImage

import voco_plugin as vp
from photos import COUNT, equal, write_images
from voco_plugin.cli import main
from voco_plugin.data.images import BadImageError, open_image
from voco_plugin.inference.answering import compress_images
from voco_plugin.store.bulk import Processes, compress_dataset
from voco_plugin.store.bulk.prefetch import prefetch
from voco_plugin.store.names import NameEntry, StoreNames, caches_by_name
from voco_plugin.store.shards import read_shards

NAME = "llava_llama"


# -- the stage


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("threads", [0, 2])
def test_every_image_has_the_cache_it_has_alone(batch_size, threads, loaded, photos, tmp_path) -> None:
    model, processor, _ = loaded
    with vp.VoCoCacheStore.for_model(tmp_path / "store", model) as store:
        done = compress_dataset(
            model, processor, tmp_path / "photos", store, batch_size=batch_size, threads=threads
        )
        assert (done["images"], done["computed"], done["hits"]) == (COUNT, COUNT, 0)
        assert len(store) == COUNT and store.verify()["bad"] == []
        found = caches_by_name(store, [str(p) for p in photos])
        for path, cache in zip(photos, found, strict=True):
            (alone,) = compress_images(model, processor, [open_image(path)])
            assert equal(cache, alone, 1e-5)
            assert equal(cache, store.get(store.key_of(path)))
        written = sum(cache.nbytes for cache in found)
    assert done["bytes_written"] == written and done["vision_bytes"] == 9 * written


def test_a_second_run_computes_nothing_and_opens_no_image(loaded, photos, tmp_path, ran, monkeypatch) -> None:
    model, processor, _ = loaded
    where = tmp_path / "store"
    compress_dataset(model, processor, tmp_path / "photos", where)
    assert sum(ran) == COUNT
    monkeypatch.setattr(PILImage, "open", lambda *_: pytest.fail("an image was opened"))
    done = compress_dataset(model, processor, tmp_path / "photos", where)
    assert sum(ran) == COUNT
    assert (done["computed"], done["hits"], done["by_name"], done["bytes_written"]) == (0, COUNT, COUNT, 0)


def test_the_same_pixels_are_computed_once(loaded, photos, tmp_path, ran) -> None:
    """Twice in a batch, in two batches, under another name or format, and in another run."""
    model, processor, _ = loaded
    PILImage.open(photos[0]).save(tmp_path / "photos" / "000-again.bmp")
    PILImage.open(photos[0]).save(tmp_path / "photos" / "zzz.tif")
    done = compress_dataset(model, processor, tmp_path / "photos", tmp_path / "store", batch_size=3)
    assert (done["images"], done["computed"], done["hits"]) == (COUNT + 2, COUNT, 2) and sum(ran) == COUNT
    PILImage.open(photos[1]).save(tmp_path / "other.bmp")
    done = compress_dataset(model, processor, tmp_path / "other.bmp", tmp_path / "store")
    assert (done["computed"], done["hits"], done["by_name"]) == (0, 1, 0) and sum(ran) == COUNT
    with vp.VoCoCacheStore(tmp_path / "store", readonly=True) as store:
        names = [str(tmp_path / "photos" / name) for name in ("000.png", "000-again.bmp", "zzz.tif")]
        first, *others = caches_by_name(store, names, 1)
        assert all(equal(first, other) for other in others)


def test_a_file_that_changed_is_computed_again_and_its_name_follows(loaded, photos, tmp_path, ran) -> None:
    model, processor, _ = loaded
    where = tmp_path / "store"
    compress_dataset(model, processor, tmp_path / "photos", where)
    write_images(tmp_path / "new", 1, seed=99)[0].replace(photos[2])
    os.utime(photos[3])  # touched, but the same
    done = compress_dataset(model, processor, tmp_path / "photos", where)
    assert (done["computed"], done["by_name"]) == (1, COUNT - 2) and sum(ran) == COUNT + 1
    with vp.VoCoCacheStore.for_model(where, model, readonly=True) as store:
        (found,) = caches_by_name(store, [str(photos[2])])
        assert equal(found, store.get(store.key_of(photos[2])))


def test_each_k_has_its_own_cache_under_the_same_name(loaded, photos, tmp_path) -> None:
    model, processor, _ = loaded
    for tokens in (1, 3):
        done = compress_dataset(model, processor, photos[0], tmp_path / "store", num_tokens=tokens)
        assert done["computed"] == 1
    with vp.VoCoCacheStore.for_model(tmp_path / "store", model, readonly=True) as store:
        assert len(store) == 2
        for tokens in (1, 3):
            (found,) = caches_by_name(store, [str(photos[0])], tokens)
            assert found.num_tokens == [tokens]


def test_what_was_finished_before_an_error_stays(loaded, photos, tmp_path, ran, monkeypatch) -> None:
    from voco_plugin.store.bulk import job as stage

    model, processor, _ = loaded
    counted = stage.compress_images

    def fails(model, processor, images, **options):
        if len(ran) == 2:
            raise RuntimeError("out of memory")
        return counted(model, processor, images, **options)

    monkeypatch.setattr(stage, "compress_images", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress_dataset(model, processor, tmp_path / "photos", tmp_path / "store", batch_size=2)
    monkeypatch.setattr(stage, "compress_images", counted)
    done = compress_dataset(model, processor, tmp_path / "photos", tmp_path / "store", batch_size=2)
    assert (done["computed"], done["by_name"]) == (COUNT - 4, 4) and sum(ran) == COUNT


@pytest.mark.parametrize("world", [2, 3])
def test_shares_fill_one_store(world, loaded, photos, tmp_path, ran) -> None:
    model, processor, _ = loaded
    with vp.VoCoCacheStore.for_model(tmp_path / "store", model) as store:
        for rank in range(world):
            compress_dataset(model, processor, tmp_path / "photos", store, rank=rank, world=world)
        assert len(store) == COUNT == sum(ran) and len(ran) == world


def test_bad_images_raise_or_are_left_out_by_name(loaded, photos, tmp_path) -> None:
    model, processor, _ = loaded
    photos[3].write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"003\.png.* no image"):
        compress_dataset(model, processor, tmp_path / "photos", tmp_path / "store", batch_size=2)
    said = []
    done = compress_dataset(
        model, processor, tmp_path / "photos", tmp_path / "store", on_bad_sample="skip",
        refused=lambda name, reason: said.append((name, reason)),
    )  # fmt: skip
    assert (done["images"], done["skipped"]) == (COUNT, 1) and done["computed"] + done["hits"] == COUNT - 1
    assert done["skipped_images"] == [{"image": str(photos[3]), "reason": said[0][1]}]
    with pytest.raises(ValueError, match="on_bad_sample='ignore'"):
        compress_dataset(model, processor, photos[0], tmp_path / "store", on_bad_sample="ignore")


def test_what_the_processor_refuses_is_left_out_with_its_twins(loaded, photos, tmp_path, monkeypatch) -> None:
    model, processor, _ = loaded
    for name in ("003-wide.png", "004-wide.png"):
        PILImage.new("RGB", (500, 1)).save(tmp_path / "photos" / name)
    kind = type(processor.image_processor)
    call = kind.__call__

    def refuse(self, images, *more, **options):
        flat = [i for entry in images for i in (entry if isinstance(entry, list) else [entry])]
        if any(i.width > 100 * i.height for i in flat):
            raise ValueError("absolute aspect ratio is too large")
        return call(self, images, *more, **options)

    monkeypatch.setattr(kind, "__call__", refuse)
    done = compress_dataset(
        model, processor, tmp_path / "photos", tmp_path / "store", on_bad_sample="skip", batch_size=9
    )
    assert (done["images"], done["computed"], done["hits"], done["skipped"]) == (COUNT + 2, COUNT, 0, 2)
    assert [Path(one["image"]).name for one in done["skipped_images"]] == ["003-wide.png", "004-wide.png"]
    with vp.VoCoCacheStore(tmp_path / "store", readonly=True) as store:
        for path in photos:  # the others did not slip by one
            (alone,) = compress_images(model, processor, [open_image(path)])
            assert equal(caches_by_name(store, [str(path)], 1)[0], alone, 1e-5)


def test_a_store_that_is_too_small_says_what_it_drove_out(loaded, photos, tmp_path) -> None:
    model, processor, _ = loaded
    with vp.VoCoCacheStore.for_model(tmp_path / "all", model) as store:
        compress_dataset(model, processor, tmp_path / "photos", store)
        size = store.stat()["bytes"] // COUNT
    with vp.VoCoCacheStore.for_model(tmp_path / "store", model, max_bytes=4 * size) as store:
        done = compress_dataset(model, processor, tmp_path / "photos", store, batch_size=2)
        assert len(store) == 4 and done["evicted"] == COUNT - 4
        with pytest.raises(ValueError, match="no longer in store"):
            caches_by_name(store, [str(photos[0])])
        again = compress_dataset(model, processor, photos[0], store)
        assert again["computed"] == 1  # its name alone is no cache


def test_another_models_store_is_refused(loaded, photos, tmp_path) -> None:
    model, processor, _ = loaded
    compress_dataset(model, processor, photos[0], tmp_path / "store")
    compress_dataset(model, processor, photos[0], shards=str(tmp_path / "shards"))
    other, its = vp.load(str(loaded[2]), vp.VoCoConfig(rule="star"))
    with pytest.raises(vp.VoCoCacheError, match="rule"):
        compress_dataset(other, its, photos[0], tmp_path / "store")
    with pytest.raises(vp.VoCoCacheError, match="rule"):
        compress_dataset(other, its, photos[0], shards=str(tmp_path / "shards"))
    with pytest.raises(ValueError, match="nowhere to write"):
        compress_dataset(model, processor, photos[0])


def test_dropout_is_off_and_the_mode_comes_back(loaded, photos, tmp_path, monkeypatch) -> None:
    model, processor, _ = loaded
    compress, seen = type(model).compress, []

    def watched(self, *args, **inputs):
        seen.append(self.training)
        return compress(self, *args, **inputs)

    monkeypatch.setattr(type(model), "compress", watched)
    model.train()
    try:
        compress_dataset(model, processor, photos[0], tmp_path / "store")
        assert model.training and seen == [False]
    finally:
        model.eval()


def test_progress_counts_up_to_what_is_reported(loaded, photos, tmp_path) -> None:
    model, processor, _ = loaded
    seen: list[tuple[int, int, int]] = []
    done = compress_dataset(
        model, processor, tmp_path / "photos", tmp_path / "store", batch_size=3,
        progress=lambda counts: seen.append((counts.images, counts.hits, counts.bytes_written)),
    )  # fmt: skip
    assert [images for images, _, _ in seen] == [3, 6, 7] and seen == sorted(seen)
    assert seen[-1][2] == done["bytes_written"]


def test_a_store_fills_shards_without_computing(loaded, photos, tmp_path, ran) -> None:
    model, processor, _ = loaded
    compress_dataset(model, processor, tmp_path / "photos", tmp_path / "store")
    done = compress_dataset(
        model, processor, tmp_path / "photos", tmp_path / "store", shards=str(tmp_path / "shards")
    )
    assert (done["computed"], done["hits"]) == (0, COUNT) and sum(ran) == COUNT
    found = {item.key: item for item in read_shards(str(tmp_path / "shards"))}
    with vp.VoCoCacheStore(tmp_path / "store", readonly=True) as store:
        assert set(found) == set(store) and all(equal(found[key].cache, store.get(key)) for key in store)


# -- its parts


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_work_done_ahead_keeps_its_order_and_its_bounds(threads) -> None:
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    results = prefetch(lambda number: number * number, items(), threads, 5)
    for number in range(50):
        assert next(results) == number * number
        assert len(taken) <= number + 7
    assert list(results) == []


def test_processes_are_read_off_the_environment() -> None:
    assert Processes.of({}) == Processes(0, 1, 0)
    assert Processes.of({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Processes(3, 8, 1)
    with pytest.raises(ValueError, match="started one"):
        Processes.of({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"})


def test_names_are_kept_exactly_and_a_changed_entry_is_found(tmp_path) -> None:
    odd = ["a", "ä/../..", "x" * 5000, "", "a\0b", "\udcff.png"]
    entries = [NameEntry(name, 1, f"{n:064x}", "s") for n, name in enumerate(odd)]
    with StoreNames(tmp_path) as names:
        names.put_many(entries)
        assert [names.get(name, 1) for name in odd] == entries
        assert names.get("a", 2) is None and names.get("b", 1) is None and len(names) == len(odd)
        names.put_many([NameEntry("a", 1, "f" * 64)])
        assert names.get("a", 1) == NameEntry("a", 1, "f" * 64) and len(names) == len(odd)
        assert {e.name for e in names} == set(odd)
    data = bytearray((tmp_path / "names" / "data.mdb").read_bytes())
    for place in range(len(data)):
        if data[place : place + 64] == b"f" * 64:
            data[place] = ord("e")
    (tmp_path / "names" / "data.mdb").write_bytes(data)
    with StoreNames(tmp_path, readonly=True) as names, pytest.raises(vp.VoCoCacheError, match="was changed"):
        names.get("a", 1)


def test_names_outgrow_their_map(tmp_path, monkeypatch) -> None:
    from voco_plugin.store import names as store_names

    monkeypatch.setattr(store_names, "_MAP_BYTES", 1 << 16)
    with StoreNames(tmp_path) as names:
        names.put_many(NameEntry(f"image-{n}", 1, f"{n:064x}") for n in range(2000))
        assert len(names) == 2000 and names.get("image-1999", 1).key == f"{1999:064x}"


# -- the command


def command(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def error(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    found = capsys.readouterr()
    assert found.out == "" and "Traceback" not in found.err
    return found.err


def test_the_command_fills_a_store_and_answers_from_it_by_name(loaded, photos, tmp_path, capsys) -> None:
    model, processor, folder = loaded
    where = tmp_path / "store"
    start = ["compress", folder, tmp_path / "photos", "--store", where]
    first, second = command(capsys, *start), command(capsys, *start)
    assert (first["computed"], second["computed"], second["hits"]) == (COUNT, 0, COUNT)
    assert second["store"]["records"] == COUNT and second["processes"] == 1
    ask = ["generate", folder, "--question", "what is it", "--max-new-tokens", "5"]
    images = [word for path in photos[:2] for word in ("--image", path)]
    names = [word for path in photos[:2] for word in ("--name", path)]
    seen = command(capsys, *ask, *images)
    for path in photos:
        path.rename(path.with_suffix(".moved"))
    by_name = command(capsys, *ask, "--store", where, *names)
    assert by_name == seen
    assert main(["store", "export", str(where), str(tmp_path / "files")]) == 0
    assert main(["store", "import", str(tmp_path / "other"), str(tmp_path / "files")]) == 0
    assert command(capsys, *ask, "--store", tmp_path / "other", *names) == seen
    moved = [word for path in photos[:2] for word in ("--image", path.with_suffix(".moved"))]
    by_content = command(capsys, *ask, "--store", where, *moved)
    assert [e["answer"] for e in by_content] == [e["answer"] for e in seen]
    together = command(capsys, *ask, "--store", where, *names, "--together")
    assert len(together) == 1
    assert "did you mean" in error(capsys, *ask, "--store", where, "--name", str(photos[0]) + "x")
    write_images(tmp_path / "new", 1, seed=50)
    said = error(capsys, *ask, "--store", where, "--image", tmp_path / "new" / "000.png")
    assert "is not in store" in said and "voco compress" in said


def test_the_command_in_words_and_with_a_limit(loaded, photos, tmp_path, capsys) -> None:
    start = ["compress", str(loaded[2]), str(tmp_path / "photos"), "--store", str(tmp_path / "store")]
    (tmp_path / "photos" / "bad.png").write_bytes(b"no")
    more = ["--max-bytes", "6KB", "--batch-size", "2", "--on-bad-sample", "skip"]
    assert main([*start, *more]) == 0
    found = capsys.readouterr()
    assert f"1 of {COUNT + 1} images skipped" in found.out and f"{COUNT} computed" in found.out
    assert "driven out again" in found.err and "bad.png" in found.err


def test_the_command_keeps_8_bits_when_asked(loaded, photos, tmp_path, capsys) -> None:
    _, _, folder = loaded
    start = ["compress", folder, tmp_path / "photos", "--store"]
    exact = command(capsys, *start, tmp_path / "exact", "--max-memory", "1GB")
    small = command(capsys, *start, tmp_path / "small", "--int8", "--num-tokens", "2")
    assert (exact["store"]["values"], small["store"]["values"]) == ("keep", "int8")
    ask = ["generate", folder, "--store", tmp_path / "small", "--question", "x", "--max-new-tokens", "2"]
    assert len(command(capsys, *ask, "--name", photos[0], "--num-tokens", "2")) == 1
    assert "with K=1" in error(capsys, *ask, "--name", photos[0])
    assert "has values='keep', not 'int8'" in error(capsys, *start, tmp_path / "exact", "--int8")


def test_the_command_writes_shards(loaded, photos, tmp_path, capsys) -> None:
    start = ["compress", loaded[2], tmp_path / "photos", "--shards", f"file://{tmp_path}/shards"]
    first, second = command(capsys, *start), command(capsys, *start)
    assert (first["computed"], second["computed"]) == (COUNT, 0) and second["shards"]["shards"] == 1
    assert len(list(read_shards(f"file://{tmp_path}/shards"))) == COUNT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nowhere to write: give --store DIR, --shards URL or --out OUT"),
        (["--out", "x", "--store", "y"], "leave it out with --store"),
        (["--out", "x", "--split", "train"], "--split needs --store or --shards"),
        (["--out", "x", "--image-column", "i"], "--image-column needs"),
        (["--out", "x", "--workers", "2"], "--workers needs"),
        (["--shards", "x", "--int8"], "--int8 is of a store"),
        (["--shards", "x", "--max-bytes", "1GB"], "--max-bytes is of a store"),
        (["--store", "x", "--max-bytes", "many"], "'many' is no size"),
        (["--store", "x", "--max-bytes", "0"], "--max-bytes 0: give a whole number of bytes, 1 or more"),
        (["--store", "x", "--max-memory", "10B"], "--max-memory 10"),
        (["--store", "x", "--threads", "-1"], "negative"),
        (["--store", "x", "--workers", "0"], "'0' is not a whole number"),
        (["--store", "x", "--engine", "spark"], "invalid choice"),
        (["--shards", "s4://x"], "Protocol not known"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, loaded, photos, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, "compress", loaded[2], photos[0], *arguments)


def test_sources_are_checked_before_the_model_loads(photos, capsys, tmp_path, monkeypatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("loading"))
    monkeypatch.setattr(
        transformers.AutoProcessor, "from_pretrained", lambda *_, **__: pytest.fail("loading")
    )
    for name, message in (("gone.png", "gone.png does not exist"), (str(tmp_path / "e"), "holds no image")):
        (tmp_path / "e").mkdir(exist_ok=True)
        assert message in error(capsys, "compress", "org/model", name, "--store", tmp_path / "s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--store", "s"], "give one of them"),
        (["--name", "n"], "--name is of a store"),
        (["--num-tokens", "2"], "--num-tokens is of a store"),
        (["--store", "gone", "--name", "n"], "no store at gone"),
        (["--store", "s", "--name", "n", "--cache", "c"], "not allowed with"),
    ],
)
def test_answering_needs_a_store_and_a_name(arguments, message, loaded, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, "generate", loaded[2], "--question", "x", *arguments)
