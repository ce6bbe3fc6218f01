"""Records in and out of a store as files: ``KEY.safetensors``, the bytes that ``VoCoCache.save`` writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..cache.container import VoCoCacheError
from ..cache.file_format import read_buffer
from ..files import atomic_path
from .env import Environment
from .keys import key_bytes

_BATCH_BYTES = 64 << 20


def export(
    env: Environment,
    folder: Path,
    keys: Iterable[str],
    check: Callable[[Any, str], Any],
    *,
    may_be_gone: bool,
) -> int:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.export`.

    Args:
        keys: of the records to write.
        check: ``check(transaction, key)`` reads a record with every check, before it is written.
        may_be_gone: whether a key without a record is passed over (it was evicted meanwhile).

    Raises:
        KeyError: there is no such record.
        VoCoCacheError: ``folder`` is a file, or a record is damaged.
    """
    count = 0
    if folder.exists() and not folder.is_dir():
        raise VoCoCacheError(f"{folder} is a file; export writes a folder of files.")
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        with env.read() as txn:
            record = txn.get(key_bytes(key), db=env.dbs["blocks"])
            if record is None:
                if may_be_gone:
                    continue
                raise KeyError(key)
            check(txn, key)
            with atomic_path(folder / f"{key}.safetensors") as temporary, open(temporary, "wb") as stream:
                stream.write(record)
        count += 1
    return count


def import_(
    folder: Path,
    put: Callable[[dict[bytes, bytes], list[dict[str, Any]]], int],
    check: Callable[[dict[str, Any], str, str], Any],
    max_bytes: int | None,
) -> int:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.import_`; in transactions of 64 MiB.

    Args:
        put: ``put(records, fingerprints)`` puts records by their keys; how many were new.
        check: ``check(fingerprint, values, file)`` raises where a file does not belong in the store.
        max_bytes: the store's limit.

    Raises:
        FileNotFoundError: the folder is not there.
        VoCoCacheError: a file is not a cache, does not belong in the store, or its name is not a key.
    """
    batch_bytes = min(_BATCH_BYTES, max_bytes or _BATCH_BYTES)
    count, size = 0, 0
    waiting: dict[bytes, bytes] = {}
    makers: list[dict[str, Any]] = []
    for key, record, made_by in _records(folder, check):
        if waiting and size + len(record) > batch_bytes:
            count += put(waiting, makers)
            waiting, size = {}, 0
        waiting[key] = record
        size += len(record)
        if made_by not in makers:
            makers.append(made_by)
    return count + put(waiting, makers)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; import takes one that export wrote.")
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("."))
    if not files:
        raise VoCoCacheError(f"{folder} holds no .safetensors file; import takes a folder that export wrote.")
    return files


def _records(
    folder: Path, check: Callable[[dict[str, Any], str, str], Any]
) -> Iterator[tuple[bytes, bytes, dict[str, Any]]]:
    for file in _files(folder):
        try:
            key = key_bytes(file.stem)
        except VoCoCacheError:
            raise VoCoCacheError(f"{file} is not named by a key; import takes what export wrote.") from None
        record = file.read_bytes()
        parts = read_buffer(record, str(file), copy=False)
        check(parts.fingerprint, parts.values, str(file))
        yield key, record, parts.fingerprint


def maker_of(path: str | os.PathLike) -> dict[str, Any]:
    """``fingerprint`` and ``values`` of the first file of an exported folder: what a new store for it needs.

    Raises:
        FileNotFoundError: the folder is not there.
        VoCoCacheError: it holds no cache.
    """
    file = _files(Path(path))[0]
    parts = read_buffer(file.read_bytes(), str(file), copy=False)
    return {"fingerprint": parts.fingerprint, "values": parts.values}
