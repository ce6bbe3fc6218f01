"""What goes wrong around a store: damage, a full disk, folders that are read-only or something else. One
clear error each, and nothing lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from stores import in_a_fork, key, made, opened, raw_put, same
from voco_plugin.cache import VoCoCacheError
from voco_plugin.cache.cache import cache_from_buffer, cache_to_bytes
from voco_plugin.cli import main
from voco_plugin.store import VoCoCacheStore
from voco_plugin.store.names import NameEntry, StoreNames
from voco_plugin.store.pages import damaged_pages

# -- damage
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["keep", "int8"])
def test_a_flipped_byte_anywhere_in_a_record_is_found(values):
    """Every byte of a record, one after the other, by what the store reads records with."""
    data = cache_to_bytes(made(1, tokens=1, layers=1, dim=4), values)
    rng = random.Random(0)
    for at in range(len(data)):
        for flip in {1 << (at % 8), rng.randrange(1, 256)}:
            wrong = bytearray(data)
            wrong[at] ^= flip
            with pytest.raises(VoCoCacheError):
                cache_from_buffer(wrong, copy=at % 2 == 0)


@pytest.mark.parametrize("dim", [16, 256])
def test_a_byte_flipped_on_the_disk_is_found_on_read(tmp_path, dim):
    """In the file itself, of a record within a page and of one over many."""
    with opened(tmp_path / "s") as store:
        store.put_many((key(n), made(n, dim=dim)) for n in range(3))
    file = tmp_path / "s" / "data.mdb"
    data = bytearray(file.read_bytes())
    record = cache_to_bytes(made(1, dim=dim))
    half, at, copies = record[len(record) // 2 :], -1, 0
    while (at := data.find(half, at + 1)) >= 0:  # freed pages still hold former copies
        data[at + 5] ^= 16
        copies += 1
    assert copies
    file.write_bytes(data)
    with opened(tmp_path / "s") as store:
        with pytest.raises(VoCoCacheError, match=f"record {key(1)} of store .* was changed since"):
            store.get(key(1))
        with store.view() as view, pytest.raises(VoCoCacheError, match="was changed since"):
            view[key(1)]
        with pytest.raises(VoCoCacheError, match="was changed since"):
            store.export(tmp_path / "files")
        assert same(store.get(key(0)), made(0, dim=dim)) and same(store.get(key(2)), made(2, dim=dim))
        found = store.verify()
        assert [bad["key"] for bad in found["bad"]] == [key(1)] and found["records"] == 3


def test_a_lost_or_cut_record_is_found(tmp_path):
    with opened(tmp_path / "s") as store:
        store.put_many((key(n), made(n)) for n in range(4))
        env = store._environment()
        env.write(lambda txn: txn.delete(bytes.fromhex(key(1)), db=env.dbs["blocks"]))
        raw_put(store, key(2), cache_to_bytes(made(2))[:-1])
        found = store.verify()
        reasons = {bad["key"]: bad["reason"] for bad in found["bad"]}
        assert set(reasons) == {key(1), key(2)}
        assert "is lost" in reasons[key(1)] and "were written" in reasons[key(2)]
        assert found["index"] == ["4 records are known, blocks holds 3"]
        assert store.delete(reasons) == 2 and store.verify()["bad"] == store.verify()["index"] == []


def test_a_damaged_index_is_found(tmp_path):
    with opened(tmp_path / "s") as store:
        store.put_many((key(n), made(n)) for n in range(2))
        env = store._environment()
        env.write(lambda txn: txn.put(bytes.fromhex(key(0)), bytes(16), db=env.dbs["facts"]))
        assert len(store.verify()["index"]) == 2
        env.write(lambda txn: txn.put(bytes.fromhex(key(0)), b"short", db=env.dbs["facts"]))
        for use in (store.verify, lambda: store.put(key(0), made(0)), lambda: store.delete([key(0)])):
            with pytest.raises(VoCoCacheError, match="the index of the store is damaged"):
                use()


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_cut_database_file_is_refused(tmp_path, keep):
    """Reading past the end of a mapped file would end the process."""
    pytest.importorskip("lmdb.verify", reason="lmdb before 3.0 cannot look at a file without trusting it")
    with opened(tmp_path / "s") as store:
        store.put_many((key(n), made(n, tokens=8)) for n in range(30))
    assert damaged_pages(tmp_path / "s") == []
    file = tmp_path / "s" / "data.mdb"
    os.truncate(file, int(file.stat().st_size * keep))
    with pytest.raises(VoCoCacheError, match="was cut|is no LMDB file"):
        opened(tmp_path / "s")
    assert main(["store", "stat", str(tmp_path / "s")]) == 2


@pytest.mark.parametrize("after", ["deleted", "moved", "replaced"])
def test_a_folder_that_is_gone_is_noticed(tmp_path, after, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, names = opened("s"), StoreNames("s")  # a relative path: leaving the folder is no fault
    monkeypatch.chdir("/")
    store.put(key(1), made(1))
    (tmp_path / "s").rename(tmp_path / "t")
    if after == "replaced":
        with opened(tmp_path / "u") as new:  # lmdb before 3.0 opens a path once in a process
            new.put(key(2), made(2))
        (tmp_path / "u").rename(tmp_path / "s")
    if after == "deleted":
        shutil.rmtree(tmp_path / "t")
    for use in (
        lambda: store.put(key(3), made(3)),
        lambda: store.get(key(1)),
        lambda: key(1) in store,
        lambda: names.put_many([NameEntry("a", 2, key(1))]),
    ):
        with pytest.raises(VoCoCacheError, match="was deleted, moved or replaced while it was open"):
            use()
    store.close()
    names.close()
    assert (tmp_path / "s").exists() == (after == "replaced"), "closing makes no folder"


def test_what_is_no_store_is_refused(tmp_path):
    import lmdb

    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"no database" * 1000)
    with lmdb.open(str(tmp_path / "foreign")) as env, env.begin(write=True) as txn:
        txn.put(b"a", b"b")
    for name, message in (
        ("file", "is a file; a store is a folder"), ("photos", "holds 'cat.png' and no data.mdb"),
        ("junk", "is no LMDB file"), ("foreign", "an LMDB folder but no VoCo store"),
    ):  # fmt: skip
        with pytest.raises(VoCoCacheError, match=message):
            opened(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no store at .*needs a fingerprint"):
        VoCoCacheStore(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no store at"):
        opened(tmp_path / "none", readonly=True)
    assert not (tmp_path / "none").exists()
    with lmdb.open(str(tmp_path / "foreign")) as env, env.begin() as txn:
        assert txn.get(b"a") == b"b" and txn.stat()["entries"] == 1, "nothing was written into it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: {**facts, "version": 9}, "has format version 9; this release reads 1"),
        (lambda facts: {**facts, "format": "other"}, "description of store .* cannot be read"),
        (lambda facts: {**facts, "values": "int3"}, "description of store .* cannot be read"),
        (lambda facts: {**facts, "max_bytes": "lots"}, "description of store .* cannot be read"),
        (lambda facts: {**facts, "more": 1}, "description of store .* cannot be read"),
        (lambda facts: [1], "description of store .* cannot be read"),
    ],
)
def test_another_version_or_description_is_refused(tmp_path, change, message):
    with opened(tmp_path / "s") as store:
        env = store._environment()

        def work(txn):
            facts = json.loads(bytes(txn.get(b"store", db=env.dbs["meta"])))
            txn.put(b"store", json.dumps(change(facts)).encode(), db=env.dbs["meta"])

        env.write(work)
    with pytest.raises(VoCoCacheError, match=message):
        opened(tmp_path / "s")


# -- a full disk
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    ) if shutil.which("mount") else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("this process may not mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(store) -> int:
    """Put until it fails; how many went in."""
    for n in range(10_000):
        try:
            store.put(key(n), made(n, tokens=8))
        except OSError:
            return n
    raise AssertionError("the disk is not small")


def test_a_full_disk_is_named_and_nothing_is_lost(small_disk):
    with opened(small_disk / "s") as store:
        count = fill(store)
        assert count > 20
        with pytest.raises(OSError, match=r"the disk of store .* is full; nothing of this write was kept"):
            store.put_many((key(n), made(n, tokens=8)) for n in range(5000, 5100))
        found = store.verify()
        assert (found["records"], found["bad"], found["index"]) == (count, [], [])
        assert all(same(store.get(key(n)), made(n, tokens=8)) for n in range(count))
    with opened(small_disk / "s") as store:
        assert len(store) == count
        assert main(["store", "stat", str(small_disk / "s")]) == 0


def test_recency_on_a_full_disk_is_a_warning(small_disk, caplog, monkeypatch):
    """And reading goes on: in a child, since a lock file with holes would end the process."""
    monkeypatch.setattr("voco_plugin.store.recency.BATCH", 1)

    def work():
        with opened(small_disk / "s") as store:
            store.put_many((key(n), made(n)) for n in range(200))
            with contextlib.suppress(OSError), open(small_disk / "rest", "wb", buffering=0) as stream:
                while stream.write(bytes(4096)):
                    pass
            # each is to be noted at once; at some point no page is left for it
            read = all(same(store.get(key(n)), made(n)) for n in range(200))
        return read, any("could not be noted" in record.message for record in caplog.records)

    assert in_a_fork(work) == (True, True)


def test_a_file_size_limit_is_named_and_nothing_is_lost(tmp_path):
    """Where no tmpfs can be mounted, the same by the limit on file sizes (ulimit -f)."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        with opened(tmp_path / "s") as store:
            try:
                store.put_many((key(n), made(n, tokens=8)) for n in range(1000))
            except OSError as error:
                message = str(error)
            return message, fill(store)

    message, count = in_a_fork(work)
    assert "a limit on the size of files" in message, message
    with opened(tmp_path / "s") as store:
        assert len(store) == count > 10 and store.verify()["bad"] == []


# -- permissions
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def public(tmp_path):
    """A folder that another user can reach, and that user; root sees no permissions."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and folder != Path("/tmp"):
            folder.chmod(0o755)
    return tmp_path, 65534


def refused(work) -> str:
    try:
        work()
    except (VoCoCacheError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def test_a_read_only_folder_is_named(public):
    folder, nobody = public
    with opened(folder / "s") as store:
        store.put(key(1), made(1))
    assert "Permission" in in_a_fork(lambda: refused(lambda: opened(folder / "new")), nobody)
    os.chmod(folder / "s" / "lock.mdb", 0o666)
    os.chmod(folder / "s" / "data.mdb", 0o644)
    text = in_a_fork(lambda: refused(lambda: opened(folder / "s")), nobody)
    assert "PermissionError" in text and "read-only; open it with readonly=True" in text

    def read():
        with opened(folder / "s", readonly=True) as store:
            return same(store.get(key(1)), made(1)), store.verify()["bad"]

    assert in_a_fork(read, nobody) == (True, [])


def test_a_lock_that_cannot_be_made_is_named(public):
    folder, nobody = public
    with opened(folder / "s") as store:
        store.put(key(1), made(1))
    os.chmod(folder / "s" / "lock.mdb", 0o644)
    os.chmod(folder / "s" / "data.mdb", 0o644)
    text = in_a_fork(lambda: refused(lambda: opened(folder / "s", readonly=True)), nobody)
    assert "PermissionError" in text and "lock.mdb cannot be locked" in text and "lock=False" in text

    def read():
        with opened(folder / "s", readonly=True, lock=False) as store:
            return same(store.get(key(1)), made(1))

    assert in_a_fork(read, nobody) is True


def test_a_folder_without_permission_is_named(public):
    folder, nobody = public
    opened(folder / "s").close()
    os.chmod(folder / "s", 0o700)
    assert "PermissionError" in in_a_fork(lambda: refused(lambda: opened(folder / "s")), nobody)
