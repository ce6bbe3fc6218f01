"""Reads mutated caches as files and as records of a store, and counts what became of them.

    python tests/helpers/fuzzing.py COUNT SEED

The readers run in a forked process of their own with little memory to spare, so that a crash, a hang or a
large allocation ends that process and is seen.
"""

from __future__ import annotations

import collections
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import stores
from mutations import BLIND, FORGED
from stores import header_of, key, made, same, with_header
from voco_plugin.cache import VoCoCache, VoCoCacheError
from voco_plugin.cache.cache import cache_from_buffer, cache_to_bytes
from voco_plugin.cache.file_format import read_buffer
from voco_plugin.store import VoCoCacheStore

SPARE_BYTES = 1 << 29
"""Memory that reading may take beyond what the process has; the inputs are below 200 KB."""

SECONDS = 2.0
"""How long one input may take."""

_BATCH = 250


def corpus() -> list[bytes]:
    """Saved caches of every kind: dtypes, several blocks, none, 8 bits, and one in another order."""
    caches = [
        made(1), made(2, tokens=1, layers=1, dim=4), made(3, blocks=3, dtype=torch.bfloat16),
        made(4, dtype=torch.float16, layers=3), made(5, dtype=torch.float64, tokens=1),
        VoCoCache((), fingerprint=stores.MADE_BY),
        VoCoCache(made(6, blocks=2).blocks, [2, 0], 4, stores.MADE_BY),
    ]  # fmt: skip
    for cache in caches:
        cache.fingerprint = stores.MADE_BY  # of the store they are put into
    data = [cache_to_bytes(cache) for cache in caches]
    data += [cache_to_bytes(made(7), "int8"), cache_to_bytes(made(8, dim=40, blocks=2), "int8")]
    header, start = header_of(data[0])
    metadata = dict(reversed(header["__metadata__"].items()))  # in the order that safetensors may write
    data.append(with_header({**header, "__metadata__": metadata}, data[0][start:]))
    return data


def outcome(read, data: bytes, original: VoCoCache, forged: bool) -> str:
    """``refused``, ``equal``, or for a forged file ``as it says``: a whole cache of what the file states.

    Raises:
        AssertionError: another error than VoCoCacheError, or another cache than that.
    """
    try:
        found = read()
    except VoCoCacheError:
        return "refused"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    if same(found, original):
        return "equal"
    assert forged, "a changed file was read as another cache"
    # its checksum holds, so it is what somebody saved: it must be read as exactly that
    parts = read_buffer(data, "again")
    again = cache_to_bytes(found, parts.values) if parts.values == "keep" else None
    if again is not None:
        record = header_of(data)[0]["__metadata__"]["voco"]
        assert header_of(again)[0]["__metadata__"]["voco"] == record, "read as another record"
        assert same(cache_from_buffer(again), found)
    assert found.nbytes <= 8 * len(data), "more than the file holds"
    return "as it says"


def _run(count: int, seed: int, folder: Path, report) -> None:
    rng = random.Random(seed)
    data = corpus()
    originals = [cache_from_buffer(d) for d in data]
    store = VoCoCacheStore(folder / "s", fingerprint=stores.MADE_BY)
    file = folder / "x.safetensors"
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    slowest, left = 0.0, count

    def reading(kind: str, wrong: bytes, name: str):
        if kind == "file":
            file.write_bytes(wrong)
            return lambda: VoCoCache.load(file)
        return lambda: _from_store(store, name, original)

    while left:
        batch = []
        for number in range(min(_BATCH, left)):
            which = rng.randrange(len(data))
            mutation = rng.choice((*BLIND, *FORGED))
            batch.append((number, which, mutation, mutation(rng, data[which], rng.choice(data))))
        left -= len(batch)
        put_all(store, {key(number): wrong for number, _, _, wrong in batch if number % 2})
        for number, which, mutation, wrong in batch:
            original, kind = originals[which], ("file", "record")[number % 2]
            read = reading(kind, wrong, key(number))
            begin = time.perf_counter()
            try:
                result = outcome(read, wrong, original, mutation in FORGED)
            except AssertionError as error:
                report({"failed": f"{kind} {mutation.__name__}: {error}", "input": wrong.hex()[:4000]})
                return
            slowest = max(slowest, time.perf_counter() - begin)
            counts[kind, mutation.__name__, result] += 1
    store.close()
    totals: collections.Counter[str] = collections.Counter()
    for (kind, _, result), n in counts.items():
        totals[f"{kind} {result}"] += n
    report({
        "inputs": count, "seed": seed, "slowest_seconds": round(slowest, 4),
        "totals": dict(sorted(totals.items())),
        "by_mutation": {" ".join(k): n for k, n in sorted(counts.items())},
    })  # fmt: skip


def put_all(store: VoCoCacheStore, records: dict[str, bytes]) -> None:
    """Put bytes where records are, past every check."""
    env = store._environment()
    env.write(
        lambda txn: [txn.put(bytes.fromhex(name), d, db=env.dbs["blocks"]) for name, d in records.items()]
    )


def _from_store(store: VoCoCacheStore, name: str, original: VoCoCache) -> VoCoCache:
    """Read with and without copies: both must come to the same."""
    try:
        found = store.get(name)
    except VoCoCacheError:
        with store.view() as view:
            try:
                view[name]
            except VoCoCacheError:
                raise
            raise AssertionError("a view read what get refused") from None
    with store.view() as view:
        assert same(view[name], found)
    return found


def fuzz(count: int, seed: int) -> dict:
    """``count`` mutated inputs, half as files, half as records; what was counted.

    Raises:
        AssertionError: a crash, a hang, too much memory, another error than VoCoCacheError, or wrong data;
            the message has the input.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            try:
                _limit(count)
                with os.fdopen(writing, "wb") as stream:
                    try:
                        _run(count, seed, Path(folder), lambda found: pickle.dump(found, stream))
                    except BaseException:
                        pickle.dump({"failed": traceback.format_exc()}, stream)
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            answer = stream.read()
        _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"the reader was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    assert answer, "the reader ended without a word"
    found = pickle.loads(answer)
    assert "failed" not in found, found
    assert found["slowest_seconds"] < SECONDS, found
    return found


def _limit(count: int) -> None:
    """Little memory beyond what there is (and the store's map), and an end to hangs."""
    with open("/proc/self/statm") as stream:
        mapped = int(stream.read().split()[0]) * resource.getpagesize()
    from voco_plugin.store import env as store_env

    store_env.MAP_SIZE = 1 << 30
    limit = mapped + (1 << 30) + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.alarm(60 + count // 50)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2])), indent=1) + "\n")
