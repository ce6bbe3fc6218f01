"""A store under several processes: writers and readers at once, forks, and SIGKILL at any moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import store_worker
from paths import HELPERS, ROOT
from store_worker import numbered
from stores import in_a_fork, key, made, opened, same
from voco_plugin.cache import VoCoCacheError
from voco_plugin.store import VoCoCacheStore

FORKS = multiprocessing.get_context("forkserver")
"""Workers are forked by a process that has imported torch once and has opened no store."""


@contextlib.contextmanager
def worker(*arguments: object):
    """A process of store_worker.py that has said it is ready, and what it says from then on."""
    said, saying = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=store_worker.work, args=(saying, *map(str, arguments)), daemon=True)
    with pytest.MonkeyPatch.context() as patch:  # for the process that forks, which the first worker starts
        patch.setenv("PYTHONPATH", f"{ROOT}:{HELPERS}")
        FORKS.set_forkserver_preload(["store_worker"])
        process.start()
    saying.close()
    with os.fdopen(os.dup(said.fileno())) as stream:
        said.close()
        try:
            first = stream.readline()
            assert first == "ready\n", first + stream.read()
            yield process, stream
        finally:
            process.kill()
            process.join()


def finished(process, stream) -> list[int]:
    """The numbers it prints until it ends, which must be well."""
    process.join(120)
    assert not process.is_alive(), "still at work"
    out = stream.read()
    assert process.exitcode == 0, out
    return [int(word) for word in out.split()]


# -- killed
# ----------------------------------------------------------------------------------------------------


def kill_a_writer(folder: Path, first: int, after: float) -> set[int]:
    """What a writer, killed ``after`` seconds at work, had acknowledged. It is forked: starting Python anew
    would take longer than all it writes.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writing, 1)
            store_worker.write(str(folder), str(first), "1000000", "0")
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        assert stream.readline() == "ready\n"
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        lines = stream.read().split("\n")[:-1]  # a line that was not ended is no acknowledgement
    assert os.WIFSIGNALED(status), "it ended by itself"
    return {int(word) for line in lines for word in line.split()}


def check_after_kill(folder: Path, acknowledged: set[int], possible: range) -> int:
    """Every acknowledged block is there bit for bit, nothing is damaged, and what else is there is whole."""
    with VoCoCacheStore(folder) as store:
        found = store.verify()
        assert found["bad"] == [] and found["index"] == [], found
        numbers = {key(n): n for n in possible}
        there = {numbers[name] for name in store}
        assert acknowledged <= there, f"lost: {sorted(acknowledged - there)[:5]}"
        assert all(same(store.get(key(n)), numbered(n)) for n in there)
        return len(there - acknowledged)


def test_no_kill_loses_or_corrupts_a_block(tmp_path):
    found = kills_at_random_moments(tmp_path, 5)
    assert found["acknowledged blocks, all there"] > 5, "the writers were killed before they had written"


@pytest.mark.slow
def test_sixty_kills_lose_or_corrupt_no_block(tmp_path, capsys):
    found = kills_at_random_moments(tmp_path, 60)
    assert found["acknowledged blocks, all there"] > 60, "the writers were killed before they had written"
    with capsys.disabled():
        sys.stdout.write(f"\n{found}\n")


def kills_at_random_moments(tmp_path: Path, kills: int) -> dict[str, int]:
    """Kill writers on one store, which each goes on with; after each kill all acknowledged blocks are there.
    What was counted.
    """
    rng = random.Random(kills)
    folder, acknowledged, first, unsaid = tmp_path / "s", set(), 0, 0
    opened(folder).close()
    for _ in range(kills):
        acknowledged |= kill_a_writer(folder, first, rng.uniform(0, 0.2))
        first = max(acknowledged, default=-1) + 1
        # blocks beyond those acknowledged: committed, but killed before it could say so
        unsaid = check_after_kill(folder, acknowledged, range(first + 10))
    return {"kills": kills, "acknowledged blocks, all there": len(acknowledged), "others, whole": unsaid}


def test_a_store_whose_maker_was_killed_can_be_made(tmp_path):
    """The folder is there, LMDB's file too, but no description yet."""
    import lmdb

    (tmp_path / "s").mkdir()
    lmdb.open(str(tmp_path / "s")).close()
    with pytest.raises(VoCoCacheError, match="no VoCo store"):
        VoCoCacheStore(tmp_path / "s")
    with opened(tmp_path / "s") as store:
        assert store.put(key(1), made(1))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "data.mdb").touch()
    with opened(tmp_path / "t") as store:
        assert store.put(key(1), made(1))


@pytest.mark.matrix
def test_a_killed_reader_does_not_stay(tmp_path):
    """Its snapshot would keep every page freed since from being used again."""
    big = made(0, tokens=4, layers=4, dim=128)
    with opened(tmp_path / "s") as store:
        store.put(key(0), big)
        with worker("hold", tmp_path / "s") as (process, _):
            assert store.stat()["readers"] == 1
            process.kill()
            process.join()
            assert store.stat()["readers"] == 1
        store.put(key(1), big)
        assert store.stat()["readers"] == 0


# -- at once
# ---------------------------------------------------------------------------------------------------


def test_two_writers_with_overlapping_keys(tmp_path):
    opened(tmp_path / "s").close()
    with (
        worker("write", tmp_path / "s", 0, 120, 0) as a,
        worker("write", tmp_path / "s", 60, 120, 0) as b,
    ):
        assert set(finished(*a)) | set(finished(*b)) == set(range(180))
    assert check_after_kill(tmp_path / "s", set(range(180)), range(180)) == 0


def test_readers_during_eviction(tmp_path):
    """A writer keeps evicting what two readers (one in this process) are reading: they find it whole, or not
    at all."""
    limit = 200_000
    with opened(tmp_path / "s", max_bytes=limit) as store:
        store.put_many((key(n), numbered(n)) for n in range(8))
        with (
            worker("read", tmp_path / "s", 1.5) as reader,
            worker("write", tmp_path / "s", 8, 250, limit) as writer,
        ):
            count, names = 0, {key(n): n for n in range(300)}
            while writer[0].is_alive():
                for name in store:
                    with contextlib.suppress(KeyError):
                        assert same(store.get(name), numbered(names[name]))
                        count += 1
            assert len(finished(*writer)) == 250
            assert finished(*reader)[0] > 10 and count > 10
        assert store.stat()["bytes"] <= limit and key(0) not in store
        found = store.verify()
        assert found["bad"] == found["index"] == []


def test_threads_share_a_store(tmp_path):
    with opened(tmp_path / "s", map_size=1 << 17) as store:  # it must grow while the others read
        errors: list[BaseException] = []

        def work(first: int) -> None:
            try:
                for n in range(first, first + 15):
                    store.put(key(n), numbered(n))
                    with store.view() as view:
                        assert same(view[key(n)], numbered(n))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == [] and len(store) == 60 and not any(t.is_alive() for t in threads)


def test_a_map_that_another_process_has_grown(tmp_path):
    with opened(tmp_path / "s", map_size=1 << 17) as store:
        store.put(key(0), numbered(0))
        with worker("write", tmp_path / "s", 1, 60, 0) as writer:  # its map is larger from the start
            finished(*writer)
        assert len(store) == 61 and same(store.get(key(60)), numbered(60))
        assert store.put(key(61), numbered(61))


# -- forks
# -----------------------------------------------------------------------------------------------------


def test_parent_and_child_go_on_after_a_fork(tmp_path):
    with opened(tmp_path / "s") as store, opened(tmp_path / "s") as again:
        store.put(key(0), made(0))
        store.get(key(0))

        def child():
            return store.put(key(1), made(1)), same(again.get(key(0)), made(0)), len(again)

        assert in_a_fork(child) == (True, True, 2)
        assert in_a_fork(lambda: (store.close(), again.close())) == (None, None)
        assert len(store) == 2 and same(again.get(key(1)), made(1)) and store.put(key(2), made(2))


def test_a_view_outlives_a_child_that_was_forked_in_it(tmp_path):
    """The child must not give up the parent's snapshot: its pages would be used again under the view."""
    with opened(tmp_path / "s") as store:
        store.put(key(0), made(0, tokens=9))
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(store.view())[key(0)]
            assert store.stat()["readers"] == 1
            assert "forked inside the block of a view" in in_a_fork(lambda: store.get(key(0)))

            def leave():
                stack.close()
                return same(store.get(key(0)), made(0, tokens=9)), store.put(key(-1), made(-1))

            assert in_a_fork(leave) == (True, True)
            assert store.stat()["readers"] == 1
            store.delete([key(0)])
            for n in range(1, 30):
                store.put(key(n), made(n, tokens=9))
            assert same(found, made(0, tokens=9))


def test_a_data_loader_reads_from_a_store(tmp_path):
    with opened(tmp_path / "s") as store:
        store.put_many((key(n), made(n)) for n in range(8))

        class Blocks(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, n):
                return store.get(key(n)).blocks[0].keys[0]

        loader = torch.utils.data.DataLoader(Blocks(), batch_size=4, num_workers=2)
        batches = list(loader)
        expected = torch.stack([made(n).blocks[0].keys[0] for n in range(8)])
        assert torch.equal(torch.cat(batches), expected) and len(store) == 8
