"""Parquet shards: what was written comes back, whole or with an error; finished shards are not made again."""

from __future__ import annotations

import hashlib
import io
import json
import random
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import voco_plugin as vp
from photos import COUNT, equal, write_images
from voco_plugin.cache.cache import cache_to_bytes
from voco_plugin.store.bulk import compress_dataset
from voco_plugin.store.names import NameEntry
from voco_plugin.store.shards import (
    ShardFolder,
    ShardWriter,
    names_hash,
    read_shard,
    read_shards,
    shard_names,
    write_manifest,
)

MADE_BY = {"model": "a", "rule": "isolated"}


def made(number: int, tokens: int = 2, made_by: dict | None = None) -> vp.VoCoCache:
    generator = torch.Generator().manual_seed(number)
    keys, values = (tuple(torch.randn(2, tokens, 4, generator=generator) for _ in range(3)) for _ in range(2))
    block = vp.VoCoBlock(keys, values, 4, 9, 9, order=number)
    return vp.VoCoCache([block], fingerprint=MADE_BY if made_by is None else made_by)


def entry(number: int, name: str | None = None) -> NameEntry:
    return NameEntry(name or f"image-{number}", 2, f"{number:064x}", None)


@pytest.fixture(params=["memory", "file", "path"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A prefix nobody has used."""
    return {
        "memory": f"memory://shards/{uuid.uuid4().hex}", "file": f"file://{tmp_path}/a/b",
        "path": str(tmp_path / "a" / "b"),
    }[request.param]  # fmt: skip


def write(url: str, numbers: range, shard_bytes: int = 1 << 20) -> ShardFolder:
    writer = ShardWriter(ShardFolder(url), MADE_BY, shard_bytes)
    for number in numbers:
        writer.add(entry(number), made(number))
    writer.flush()
    return writer.folder


# -- round trips


@pytest.mark.parametrize("shard_bytes", [1, 4000, 1 << 20])
def test_what_was_written_comes_back_bit_for_bit(shard_bytes, url) -> None:
    folder = write(url, range(9), shard_bytes)
    size = len(cache_to_bytes(made(0)))
    per_shard = max(1, -(-shard_bytes // size))
    assert len(folder.shards()) == max(1, -(-9 // per_shard))
    found = {item.name: item for item in read_shards(url)}
    assert sorted(found) == [f"image-{n}" for n in range(9)]
    for number in range(9):
        item = found[f"image-{number}"]
        assert item.key == f"{number:064x}" and equal(item.cache, made(number))
        assert item.cache.fingerprint == MADE_BY and item.cache.blocks[0].order == number
    assert {e for e, _ in shard_names(folder)} == {entry(n) for n in range(9)}


def test_other_programs_read_the_columns(url) -> None:
    folder = write(url, range(2))
    (name,) = folder.shards()
    table = pq.read_table(io.BytesIO(folder.get(name)))
    row = table.to_pylist()[1]
    told = {k: row[k] for k in ("name", "K", "num_vision", "extent", "position", "order", "dtype", "layers")}
    assert told == {
        "name": "image-1", "K": 2, "num_vision": 9, "extent": 9, "position": 4, "order": 1,
        "dtype": "float32", "layers": 3,
    }  # fmt: skip
    assert (row["heads"], row["head_dim"], row["relocatable"]) == (2, 4, True)
    assert row["cache"] == cache_to_bytes(made(1))


def test_a_shard_written_twice_is_there_once_and_nothing_else_is_left(url) -> None:
    write(url, range(3))
    folder = write(url, range(3))
    assert len(folder.shards()) == 1
    listed = [str(p).rsplit("/", 1)[-1] for p in folder.fs.ls(folder.root, detail=False)]
    assert listed == folder.shards()
    assert hashlib.sha256(folder.get(listed[0])).hexdigest() + ".parquet" == listed[0]


def test_each_key_is_read_once_and_further_names_hold_no_bytes(url) -> None:
    writer = ShardWriter(ShardFolder(url), MADE_BY)
    writer.add(entry(0), made(0))
    writer.add(entry(0, "twin"), None)
    writer.flush()
    other = ShardWriter(ShardFolder(url), MADE_BY)  # a process that did not know
    other.add(entry(0, "stranger"), made(0))
    other.flush()
    assert len(list(read_shards(url))) == 1
    assert {e.name for e, _ in shard_names(writer.folder)} == {"image-0", "twin", "stranger"}


def test_a_protocol_without_a_single_put_is_written_beside_and_moved(tmp_path) -> None:
    folder = ShardFolder(f"file://{tmp_path}/x")
    folder.local = folder.single_put = False
    folder.put("a", b"1")
    folder.put("a", b"2")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a"] and folder.get("a") == b"2"


# -- runs


def test_a_run_that_is_started_again_makes_no_finished_shard_again(loaded, photos, url, ran) -> None:  # noqa: F811
    model, processor, _ = loaded
    folder = photos[0].parent
    first = compress_dataset(model, processor, folder, shards=url, shard_bytes=1, batch_size=2)
    assert (first["computed"], sum(ran)) == (COUNT, COUNT)
    shards = ShardFolder(url).shards()
    assert len(shards) == COUNT
    again = compress_dataset(model, processor, folder, shards=url, shard_bytes=1)
    assert (again["computed"], again["by_name"]) == (0, COUNT) and ShardFolder(url).shards() == shards
    write_images(folder / "more", 2, seed=70)
    third = compress_dataset(model, processor, folder, shards=url)
    assert (third["computed"], third["by_name"]) == (2, COUNT) and sum(ran) == COUNT + 2
    assert len(list(read_shards(url))) == COUNT + 2


def test_the_same_pixels_lie_in_shards_once_under_every_name(loaded, photos, url) -> None:  # noqa: F811
    model, processor, _ = loaded
    for name in ("000-twin.png", "zzz.png"):
        (photos[0].parent / name).write_bytes(photos[0].read_bytes())
    done = compress_dataset(model, processor, photos[0].parent, shards=url, batch_size=2)
    assert (done["computed"], done["hits"]) == (COUNT, 2)
    folder = ShardFolder(url)
    rows = [row for n in folder.shards() for row in pq.read_table(io.BytesIO(folder.get(n))).to_pylist()]
    assert len(rows) == COUNT + 2 and sum(row["cache"] is not None for row in rows) == COUNT
    keys = {Path(row["name"]).name: row["key"] for row in rows}
    assert keys["000.png"] == keys["000-twin.png"] == keys["zzz.png"] != keys["001.png"]


def test_a_run_that_dies_keeps_its_finished_shards(loaded, photos, url, ran, monkeypatch) -> None:  # noqa: F811
    model, processor, _ = loaded
    put = ShardFolder.put

    def dies(self, name, data):
        if len(self.shards()) == 3:
            raise KeyboardInterrupt
        put(self, name, data)

    monkeypatch.setattr(ShardFolder, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        compress_dataset(model, processor, photos[0].parent, shards=url, shard_bytes=1, batch_size=1)
    assert len(list(read_shards(url))) == 3
    monkeypatch.setattr(ShardFolder, "put", put)
    done = compress_dataset(model, processor, photos[0].parent, shards=url, batch_size=1)
    assert (done["computed"], done["hits"]) == (COUNT - 3, 3) and len(list(read_shards(url))) == COUNT


def test_an_error_leaves_a_shard_of_what_was_finished(loaded, photos, url, monkeypatch) -> None:  # noqa: F811
    model, processor, _ = loaded
    compress, calls = type(model).compress, []

    def fails(self, *args, **inputs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return compress(self, *args, **inputs)

    monkeypatch.setattr(type(model), "compress", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress_dataset(model, processor, photos[0].parent, shards=url, batch_size=2)
    assert len(list(read_shards(url))) == 4


# -- what cannot be trusted


def test_no_changed_byte_is_read_as_a_cache(tmp_path) -> None:
    folder = write(str(tmp_path), range(3))
    (name,) = folder.shards()
    data, digest = folder.get(name), name.removesuffix(".parquet")
    good = [cache_to_bytes(item.cache) for item in read_shard(data, "shard", digest)]
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        spoiled = bytearray(data)
        spoiled[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(vp.VoCoCacheError, match="its hash is not its name"):
            read_shard(bytes(spoiled), "shard", digest)
        try:  # under another name: what is still read is what was written
            found = read_shard(bytes(spoiled), "shard")
        except vp.VoCoCacheError:
            refused += 1
            continue
        assert all(cache_to_bytes(item.cache) in good for item in found)
    assert refused > 100  # most others change statistics that nobody asks for
    for length in (0, 3, 8, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(vp.VoCoCacheError):
            read_shard(data[:length], "shard")


def test_a_changed_shard_is_found_by_its_name_and_a_lost_one_by_the_manifest(url) -> None:
    folder = write(url, range(4), shard_bytes=1)
    listed = write_manifest(folder)
    assert sorted(listed["shards"]) == folder.shards() and listed["fingerprint"] == MADE_BY
    assert json.loads(folder.get("manifest.json")) == listed
    assert all(facts["rows"] == 1 for facts in listed["shards"].values())
    assert len(list(read_shards(url))) == 4
    name = folder.shards()[0]
    data = folder.get(name)
    folder.fs.pipe_file(folder.path(name), data[:-20] + bytes(20))
    with pytest.raises(vp.VoCoCacheError, match=f"{name} was changed"):
        list(read_shards(url))
    folder.fs.rm(folder.path(name))
    with pytest.raises(vp.VoCoCacheError, match=r"1 shard\(s\) of its manifest are missing"):
        list(read_shards(url))
    folder.put(name, data)
    for text in (b"{", b"[]", b'{"shards": 3}'):
        folder.fs.pipe_file(folder.path("manifest.json"), text)
        with pytest.raises(vp.VoCoCacheError, match="is no manifest"):
            list(read_shards(url))


def _named(metadata: dict, _: None, rows: list[dict]) -> None:
    """The hash of names and keys, as if by who changed them."""
    metadata["names"] = names_hash(rows)


def _rewritten(data: bytes, change) -> bytes:
    """A shard with its rows or metadata changed, and otherwise a sound Parquet file."""
    table = pq.read_table(io.BytesIO(data))
    rows, metadata = table.to_pylist(), json.loads(table.schema.metadata[b"voco"])
    change(rows, metadata)
    schema = table.schema.with_metadata({b"voco": json.dumps(metadata).encode()})
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out, compression="none", use_dictionary=False)
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, meta: meta.update(format_version=9), "format version 9; this release reads 1"),
        (lambda rows, meta: meta.update(fingerprint=3), "format version 1"),
        (lambda rows, meta: meta.update(fingerprint={"model": "b"}), "fingerprint of 'image-0'"),
        (lambda rows, meta: meta.pop("names"), "no shard of VoCo caches"),
        (lambda rows, meta: rows[0].update(name="b"), "names and keys were changed"),
        (lambda rows, meta: _named(meta, rows[0].update(key="../../etc"), rows), "whose key is none"),
        (lambda rows, meta: _named(meta, rows[0].update(K=0), rows), "whose key is none"),
        (lambda rows, meta: _named(meta, rows[0].update(K=5), rows), "not of one image of K tokens"),
        (lambda rows, meta: rows[0].update(num_vision=1), "num_vision of 'image-0' is not"),
        (lambda rows, meta: rows[0].update(dtype="float16"), "dtype of 'image-0' is not"),
        (lambda rows, meta: rows[0].update(layers=None), "layers of 'image-0' is not"),
        (lambda rows, meta: rows[0].update(cache=b"no cache"), "image 'image-0' is truncated or not"),
        (lambda rows, meta: rows[0].update(cache=b""), "image 'image-0' is truncated"),
    ],
)
def test_a_shard_whose_rows_do_not_hold_together_is_refused(change, message, tmp_path) -> None:
    folder = write(str(tmp_path), range(2))
    data = folder.get(folder.shards()[0])
    assert len(read_shard(_rewritten(data, lambda rows, meta: None), "shard")) == 2
    with pytest.raises(vp.VoCoCacheError, match=message):
        read_shard(_rewritten(data, change), "shard")


def test_other_parquet_files_are_no_shards(tmp_path) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), out)
    with pytest.raises(vp.VoCoCacheError, match="is a Parquet file but no shard"):
        read_shard(out.getvalue(), "other")
    table = pa.table({"cache": [bytes(1 << 20)]})
    record = {"format_version": 1, "fingerprint": {}, "names": "0" * 64}
    table = table.replace_schema_metadata({b"voco": json.dumps(record).encode()})
    packed = io.BytesIO()
    pq.write_table(table, packed, compression="zstd")
    with pytest.raises(vp.VoCoCacheError, match=r"claims \d+ bytes of columns in a file of \d+"):
        read_shard(packed.getvalue(), "bomb")
    with pytest.raises(FileNotFoundError, match="holds no shards"):
        list(read_shards(str(tmp_path)))
    (tmp_path / "mine.parquet").write_bytes(out.getvalue())  # not named as a shard is: somebody else's
    with pytest.raises(FileNotFoundError, match="holds no shards"):
        list(read_shards(str(tmp_path)))


def test_shards_of_another_model_are_refused(tmp_path) -> None:
    write(str(tmp_path), range(1))
    other = ShardWriter(ShardFolder(str(tmp_path)), {"model": "b"})
    other.add(entry(1), made(1, made_by={"model": "b"}))
    other.flush()
    with pytest.raises(vp.VoCoCacheError, match="not made by this model; give another prefix: model is"):
        write_manifest(other.folder)


def test_a_protocol_whose_package_is_missing_says_what_to_install(monkeypatch) -> None:
    with pytest.raises(ValueError, match="Protocol not known: s4"):
        ShardFolder("s4://bucket")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ImportError, match=r"s3://bucket/prefix: s3:// needs a package .*: pip install s3fs"):
        ShardFolder("s3://bucket/prefix")


def test_a_changed_name_or_key_is_found_without_reading_the_caches(tmp_path) -> None:
    """A run that is started again reads names and keys only: a wrong key would pass for a finished image."""
    folder = write(str(tmp_path), range(3))
    path = Path(folder.path(folder.shards()[0]))
    data = path.read_bytes()
    for old, new in ((f"{1:064x}", f"{7:064x}"), ("image-1", "image-7")):
        path.write_bytes(data.replace(old.encode(), new.encode()))
        with pytest.raises(vp.VoCoCacheError, match="names and keys were changed"):
            list(shard_names(folder))
    path.write_bytes(data)
    assert len(list(shard_names(folder))) == 3
