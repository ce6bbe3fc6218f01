"""What is in a store, and whether all of it is intact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..cache.container import VoCoCacheError
from .env import Environment
from .index import Index
from .meta import STORE_VERSION, StoreMeta, write_meta


def stat(env: Environment, path: Path) -> dict[str, Any]:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.stat`."""
    with env.read() as txn:
        index = Index(txn, env.dbs)
        meta = StoreMeta.read(txn, env.dbs, path)
        records, size = len(index), index.bytes
    info = env.env.info()
    return {
        "path": str(path),
        "format_version": STORE_VERSION,
        "records": records,
        "bytes": size,
        "file_bytes": (path / "data.mdb").stat().st_size,
        "max_bytes": meta.max_bytes,
        "values": meta.values,
        "error": meta.error,
        "fingerprint": meta.fingerprint,
        "map_size": info["map_size"],
        "readers": sum(1 for line in env.env.readers().splitlines()[1:] if line.split()[2:] != ["-"]),
    }


def verify(
    env: Environment,
    path: Path,
    keys: Iterable[str],
    check: Callable[[Any, str], Any],
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.verify`. Each record is read from a snapshot of its
    own, so that a long check keeps no freed pages from being used again.

    Args:
        path: the store's folder, for messages.
        keys: of the records to read.
        check: ``check(transaction, key)`` reads a record with every check, and raises ``VoCoCacheError``.
        progress: called with the number of records just read.
    """
    with env.read() as txn:
        faults = Index(txn, env.dbs).faults()
    records = size = 0
    bad: list[dict[str, str]] = []
    for key in keys:
        with env.read() as txn:
            noted = Index(txn, env.dbs).size_of(bytes.fromhex(key))
            if noted is None:
                continue  # evicted meanwhile
            try:
                record = txn.get(bytes.fromhex(key), db=env.dbs["blocks"])
                if record is None:
                    raise VoCoCacheError(f"record {key} of store {path} is lost.")
                if len(record) != noted:
                    raise VoCoCacheError(
                        f"record {key} of store {path} has {len(record)} bytes, {noted} were written."
                    )
                size += len(record)
                check(txn, key)
            except VoCoCacheError as error:
                bad.append({"key": key, "reason": str(error)})
        records += 1
        if progress is not None:
            progress(1)
    return {"records": records, "bytes": size, "bad": bad, "index": faults}


def note_error(env: Environment, path: Path, error: dict[str, Any]) -> None:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.note_error`."""

    def work(txn: Any) -> None:
        meta = StoreMeta.read(txn, env.dbs, path)
        write_meta(txn, env.dbs, dataclasses.replace(meta, error=dict(error)))

    env.write(work)
