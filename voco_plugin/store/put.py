"""Putting records into a store: all of them or none, room made for them, nothing of another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cache.container import VoCoCacheError
from .env import Environment
from .index import Index
from .keys import other_makers
from .meta import StoreMeta, write_meta


def check_maker(path: Path, meta: StoreMeta, made_by: dict[str, Any], what: str) -> None:
    """Raise where ``what`` (a cache, a record, a file) is not of the store's model and rule.

    Raises:
        VoCoCacheError: the message says in what they differ.
    """
    if not made_by:
        raise VoCoCacheError(f"{what} has no fingerprint, so it cannot be told which model made it.")
    wrong = other_makers(meta.fingerprint, made_by)
    if wrong:
        raise VoCoCacheError(f"{what} is not of store {path}: {'; '.join(wrong)}.")


def put_records(
    env: Environment,
    path: Path,
    records: Mapping[bytes, bytes],
    makers: Sequence[dict[str, Any]],
    touched: Sequence[bytes],
) -> tuple[int, StoreMeta]:
    """Put records in one transaction; how many were new, and the store's description by then.

    Args:
        records: key → bytes of a saved cache.
        makers: the fingerprints among them.
        touched: keys used since they were last noted; they count as used before these.

    Raises:
        VoCoCacheError: of another model, or more than the store's limit.
    """

    def work(txn: Any) -> tuple[int, StoreMeta]:
        before = meta = StoreMeta.read(txn, env.dbs, path)
        for made_by in makers:  # another process may have put the first block of a prefix-LM meanwhile
            meta = meta.learn(made_by)
            check_maker(path, meta, made_by, "a cache given")
        if meta is not before:
            write_meta(txn, env.dbs, meta)
        index = Index(txn, env.dbs)
        index.touch(touched)
        if meta.max_bytes is not None:
            _check_fits(records, meta.max_bytes, path)
            new = sum(len(record) for key, record in records.items() if key not in index)
            index.touch(key for key in records if key in index)  # these must not make room for the others
            index.evict(max(meta.max_bytes - new, 0))
        count = sum(index.add(key, record) for key, record in records.items())
        index.save()
        return count, meta

    return env.write(work)


def _check_fits(records: Mapping[bytes, bytes], limit: int, path: Path) -> None:
    for key, record in records.items():
        if len(record) > limit:
            raise VoCoCacheError(
                f"record {key.hex()} takes {len(record)} bytes, more than the max_bytes={limit} of store "
                f"{path}; raise the limit."
            )
    total = sum(map(len, records.values()))
    if total > limit:
        raise VoCoCacheError(
            f"{len(records)} records of one put_many take {total} bytes, more than the max_bytes={limit} of "
            f"store {path}; put fewer at once, or raise the limit."
        )
