"""Looking after a store: what is in it, whether it is whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..cache.container import VoCoCacheError
from .index import Index
from .meta import STORE_VERSION, StoreMeta, write_meta

if TYPE_CHECKING:
    from .store import VoCoCacheStore


def stat(store: VoCoCacheStore) -> dict[str, Any]:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.stat`."""
    env = store._environment()
    with env.read() as txn:
        index = Index(txn, env.dbs)
        meta = StoreMeta.read(txn, env.dbs, store.path)
        records, size = len(index), index.bytes
    info = env.env.info()
    return {
        "path": str(store.path),
        "format_version": STORE_VERSION,
        "records": records,
        "bytes": size,
        "file_bytes": (store.path / "data.mdb").stat().st_size,
        "max_bytes": meta.max_bytes,
        "values": meta.values,
        "error": meta.error,
        "fingerprint": meta.fingerprint,
        "map_size": info["map_size"],
        "readers": sum(1 for line in env.env.readers().splitlines()[1:] if line.split()[2:] != ["-"]),
    }


def verify(store: VoCoCacheStore, progress: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.verify`. Each record is read from a snapshot of its
    own, so that a long check keeps no freed pages from being used again.
    """
    env = store._environment()
    with env.read() as txn:
        faults = Index(txn, env.dbs).faults()
    records = size = 0
    bad: list[dict[str, str]] = []
    for key in store:
        with env.read() as txn:
            noted = Index(txn, env.dbs).size_of(bytes.fromhex(key))
            if noted is None:
                continue  # evicted meanwhile
            try:
                record = txn.get(bytes.fromhex(key), db=env.dbs["blocks"])
                if record is None:
                    raise VoCoCacheError(f"record {key} of store {store.path} is lost.")
                if len(record) != noted:
                    raise VoCoCacheError(
                        f"record {key} of store {store.path} has {len(record)} bytes, {noted} were written."
                    )
                size += len(record)
                store._read(txn, key, copy=False)
            except VoCoCacheError as error:
                bad.append({"key": key, "reason": str(error)})
        records += 1
        if progress is not None:
            progress(1)
    return {"records": records, "bytes": size, "bad": bad, "index": faults}


def note_error(store: VoCoCacheStore, error: dict[str, Any]) -> None:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.note_error`."""
    env = store._writable()

    def work(txn: Any) -> None:
        meta = StoreMeta.read(txn, env.dbs, store.path)
        write_meta(txn, env.dbs, dataclasses.replace(meta, error=dict(error)))

    env.write(work)
