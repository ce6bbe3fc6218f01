"""``StoreMeta``: a store's format, fingerprint, kind of values and limit; and how one is opened or made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.container import VoCoCacheError
from ..cache.file_format import VALUES
from .env import DATABASES, Environment, acquire
from .index import Index
from .keys import of_the_store, other_makers
from .pages import check_length

STORE_FORMAT = "voco-store"
STORE_VERSION = 1
_KEY = b"store"


@dataclass(frozen=True)
class StoreMeta:
    """The description in a store.

    Attributes:
        fingerprint: what made all of its caches, without K.
        values: ``"keep"`` or ``"int8"``.
        max_bytes: bytes its records may take, or ``None``.
        error: a measured error of its values, or ``None``.
    """

    fingerprint: dict[str, Any]
    values: str = "keep"
    max_bytes: int | None = None
    error: dict[str, Any] | None = None

    def to_bytes(self) -> bytes:
        return json.dumps(
            {"format": STORE_FORMAT, "version": STORE_VERSION, **dataclasses.asdict(self)}, sort_keys=True
        ).encode()

    @classmethod
    def read(cls, txn: Any, dbs: dict[str, Any], path: Path) -> StoreMeta:
        """Of a store that is open.

        Raises:
            VoCoCacheError: there is none, it cannot be read, or is of another version.
        """
        raw = txn.get(_KEY, db=dbs["meta"])
        if raw is None:
            raise VoCoCacheError(f"{path} is an LMDB folder but no VoCo store.")
        try:
            facts = json.loads(bytes(raw))
            if facts.pop("format") != STORE_FORMAT:
                raise ValueError
            version = facts.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise VoCoCacheError(f"the description of store {path} cannot be read.") from None
        if version != STORE_VERSION:
            raise VoCoCacheError(
                f"store {path} has format version {str(version)[:20]}; this release reads {STORE_VERSION}. "
                "Export it with the release that wrote it."
            )
        try:
            meta = cls(**facts)
        except TypeError:
            raise VoCoCacheError(f"the description of store {path} cannot be read.") from None
        limit = meta.max_bytes
        if (
            not isinstance(meta.fingerprint, dict)
            or meta.values not in VALUES
            or not (limit is None or (type(limit) is int and limit >= 0))
            or not (meta.error is None or isinstance(meta.error, dict))
        ):
            raise VoCoCacheError(f"the description of store {path} cannot be read.")
        return meta

    def learn(self, made_by: dict[str, Any]) -> StoreMeta:
        """With how its prefix-LM attends, which the first cache put tells."""
        if "attention" in self.fingerprint or "attention" not in made_by:
            return self
        return dataclasses.replace(self, fingerprint={**self.fingerprint, "attention": made_by["attention"]})


def write_meta(txn: Any, dbs: dict[str, Any], meta: StoreMeta) -> None:
    """Put ``meta`` into the store."""
    txn.put(_KEY, meta.to_bytes(), db=dbs["meta"])


def open_meta(
    path: Path,
    *,
    fingerprint: dict[str, Any] | None,
    readonly: bool,
    max_bytes: int | None,
    values: str | None,
    lock: bool,
    map_size: int,
) -> tuple[Environment, StoreMeta]:
    """Open the store of ``path``, or make it; see :class:`~voco_plugin.store.store.VoCoCacheStore`."""
    if values is not None and values not in VALUES:
        raise ValueError(f"values={values!r} is not known; use {' or '.join(VALUES)}.")
    if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
        raise ValueError(f"max_bytes={max_bytes!r}: give a whole number of bytes, 1 or more.")
    try:
        import lmdb
    except ImportError:
        raise ImportError("a VoCoCacheStore needs the lmdb package: pip install 'lmdb>=2.0'.") from None
    if int(lmdb.__version__.split(".")[0]) < 2:
        raise ImportError(
            f"a VoCoCacheStore needs lmdb 2.0 or newer, {lmdb.__version__} is installed, with which a forked "
            "child gives up its parent's snapshots: pip install 'lmdb>=2.0'."
        )
    _check_folder(path, fingerprint, readonly)
    env = acquire(path, readonly=readonly, map_size=map_size, lock=lock)
    try:
        return env, _opened(env, path, fingerprint, readonly, max_bytes, values)
    except BaseException:
        env.release()
        raise


def _check_folder(path: Path, fingerprint: dict[str, Any] | None, readonly: bool) -> None:
    """Nothing but a store, or a place for one."""
    if path.exists() and not path.is_dir():
        raise VoCoCacheError(f"{path} is a file; a store is a folder.")
    if (path / "data.mdb").exists():
        check_length(path)
        return
    lmdb_files = ("lock.mdb", "data.mdb")  # the second where another process has made it just now
    others = [p for p in path.iterdir() if p.name not in lmdb_files] if path.exists() else []
    if others:
        raise VoCoCacheError(f"{path} is no VoCo store: it holds {others[0].name!r} and no data.mdb.")
    if readonly or fingerprint is None:
        raise FileNotFoundError(
            f"there is no store at {path}"
            + ("." if readonly else "; a new one needs a fingerprint (VoCoCacheStore.for_model).")
        )
    path.mkdir(parents=True, exist_ok=True)


def _opened(
    env: Environment,
    path: Path,
    fingerprint: dict[str, Any] | None,
    readonly: bool,
    max_bytes: int | None,
    values: str | None,
) -> StoreMeta:
    there = bool(env.dbs)
    if there:
        with env.read() as txn:
            there = txn.get(_KEY, db=env.dbs["meta"]) is not None
    if not there:
        # a process may have died between making the folder and describing it, or another is at it now; else
        # it is not ours
        with env.read() as txn:
            foreign = {bytes(name) for name, _ in txn.cursor()} - {name.encode() for name in DATABASES}
        if foreign or fingerprint is None or readonly:
            raise VoCoCacheError(f"{path} is an LMDB folder but no VoCo store.")
        env.open_databases(create=True)
        new = StoreMeta(of_the_store(fingerprint), values or "keep", max_bytes)

        def describe(txn: Any) -> None:
            if txn.get(_KEY, db=env.dbs["meta"]) is None:  # else another process was faster
                write_meta(txn, env.dbs, new)
                Index(txn, env.dbs).save()

        env.write(describe)
    with env.read() as txn:
        meta = StoreMeta.read(txn, env.dbs, path)
    if fingerprint is not None:
        wrong = other_makers(meta.fingerprint, fingerprint, reads=readonly)
        if wrong:
            raise VoCoCacheError(
                f"store {path} was made otherwise; use another folder for this model: {'; '.join(wrong)}."
            )
    if values not in (None, meta.values):
        raise VoCoCacheError(
            f"store {path} has values={meta.values!r}, not {values!r}; leave values out, or use another "
            "folder."
        )
    if max_bytes is not None and max_bytes != meta.max_bytes:

        def limit(txn: Any) -> StoreMeta:
            changed = dataclasses.replace(StoreMeta.read(txn, env.dbs, path), max_bytes=max_bytes)
            write_meta(txn, env.dbs, changed)
            index = Index(txn, env.dbs)
            index.evict(max_bytes)
            index.save()
            return changed

        meta = env.write(limit)
    return meta
