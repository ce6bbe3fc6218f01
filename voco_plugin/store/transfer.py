"""Records in and out of a store as files: ``KEY.safetensors``, the bytes that ``VoCoCache.save`` writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache.container import VoCoCacheError
from ..cache.file_format import read_buffer
from ..files import atomic_path
from .keys import key_bytes
from .put import check_maker

if TYPE_CHECKING:
    from .store import VoCoCacheStore

_BATCH_BYTES = 64 << 20


def export(store: VoCoCacheStore, path: str | os.PathLike, keys: Iterable[str] | None = None) -> int:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.export`; every record is checked before it is
    written."""
    folder, count = Path(path), 0
    if folder.exists() and not folder.is_dir():
        raise VoCoCacheError(f"{folder} is a file; export writes a folder of files.")
    folder.mkdir(parents=True, exist_ok=True)
    env = store._environment()
    for key in store if keys is None else keys:
        with env.read() as txn:
            record = txn.get(key_bytes(key), db=env.dbs["blocks"])
            if record is None:
                if keys is None:
                    continue  # evicted meanwhile
                raise KeyError(key)
            store._read(txn, key, copy=False)
            with atomic_path(folder / f"{key}.safetensors") as temporary, open(temporary, "wb") as stream:
                stream.write(record)
        count += 1
    return count


def import_(store: VoCoCacheStore, path: str | os.PathLike) -> int:
    """See :meth:`~voco_plugin.store.store.VoCoCacheStore.import_`; in transactions of 64 MiB.

    Raises:
        FileNotFoundError: the folder is not there.
        VoCoCacheError: a file is no cache, of another model, in other values than the store's, or its name is
            no key.
    """
    batch_bytes = min(_BATCH_BYTES, store.max_bytes or _BATCH_BYTES)
    count, size = 0, 0
    waiting: dict[bytes, bytes] = {}
    makers: list[dict[str, Any]] = []
    for key, record, made_by in _records(store, Path(path)):
        if waiting and size + len(record) > batch_bytes:
            count += store._put_records(waiting, makers)
            waiting, size = {}, 0
        waiting[key] = record
        size += len(record)
        if made_by not in makers:
            makers.append(made_by)
    return count + store._put_records(waiting, makers)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; import takes one that export wrote.")
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("."))
    if not files:
        raise VoCoCacheError(f"{folder} holds no .safetensors file; import takes a folder that export wrote.")
    return files


def _records(store: VoCoCacheStore, folder: Path) -> Iterator[tuple[bytes, bytes, dict[str, Any]]]:
    for file in _files(folder):
        try:
            key = key_bytes(file.stem)
        except VoCoCacheError:
            raise VoCoCacheError(f"{file} is not named by a key; import takes what export wrote.") from None
        record = file.read_bytes()
        parts = read_buffer(record, str(file), copy=False)
        check_maker(store.path, store._meta, parts.fingerprint, str(file))
        if parts.values != store.values:
            raise VoCoCacheError(
                f"{file} has values={parts.values!r}, store {store.path} {store.values!r}; import it into a "
                "store of its own."
            )
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
