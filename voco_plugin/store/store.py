"""``VoCoCacheStore``: compressed images by the content of the image, on disk, for many processes at once.

An LMDB folder. A record is the bytes of a saved cache, so that a store and a file are read by the same
checks; its key says which pixels, model, adapter, processor, rule and K made it (:mod:`.keys`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cache.cache import VoCoCache, cache_from_parts, cache_to_bytes
from ..cache.container import VoCoCacheError
from ..cache.file_format import read_buffer
from . import transfer, verify
from .env import MAP_SIZE, Environment
from .index import Index
from .keys import KeysGiven, fingerprint_of, image_key, key_bytes
from .meta import StoreMeta, open_meta
from .put import check_maker, put_records
from .reader_uses import add_uses, take_uses
from .recency import Recency
from .transfer_names import export_names, import_names, read_names
from .view import StoreView

_KEYS_AT_ONCE = 10_000


class VoCoCacheStore:
    """Caches by key, all of one model, adapter, processor and rule. Use it as a context manager, or close it.

    Any number of processes may read and write it; one writes at a time, the others wait. A put is on the disk
    when it returns, whole or not at all. After a fork, and when it is pickled to another process, it opens
    the folder again by itself. Threads may share it.

    Args:
        path: the folder; made where it is not there (with a ``fingerprint``).
        fingerprint: what makes the caches (:func:`~voco_plugin.cache.fingerprint.fingerprint`). A store that
            is there must be of the same. ``None`` takes a store as it is.
        readonly: never write to the database. What was used is left in a small file beside it
            (``uses.txt``), which the next writer takes in; where the folder may not be written to, or with
            ``lock=False``, it is not noted.
        max_bytes: bytes its records may take; those used longest ago make room. Kept in the store; ``None``
            leaves what it says (no limit for a new one).
        values: ``"keep"`` (bit for bit) or ``"int8"`` for a new store; ``None`` leaves what it says
            (``"keep"`` for a new one).
        lock: ``False`` to read a store in a folder that may not be written to, while nobody writes it.
        map_size: bytes of address space at first; grows by itself.

    Raises:
        VoCoCacheError: the folder is not a store, or is one of another model (the message says in what), of
            another ``values`` or of another format version.
        OSError: it is not there, or cannot be read, written or locked.
        ImportError: the lmdb package is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        fingerprint: dict[str, Any] | None = None,
        readonly: bool = False,
        max_bytes: int | None = None,
        values: str | None = None,
        lock: bool = True,
        map_size: int = MAP_SIZE,
    ) -> None:
        self.path, self.readonly = Path(path), readonly
        self._options: dict[str, Any] = {"fingerprint": fingerprint, "max_bytes": max_bytes, "values": values}
        self._lock, self._map_size = lock, map_size
        if not lock and not readonly:
            raise ValueError("lock=False is for reading only: add readonly=True.")
        if readonly and max_bytes is not None:
            raise ValueError("a store opened with readonly=True keeps its limit; leave max_bytes out.")
        self._closed = False
        self._given = KeysGiven()
        self._env: Environment | None = None
        self._meta: StoreMeta
        self._reopen()

    @classmethod
    def for_model(cls, path: str | os.PathLike, model: torch.nn.Module, **options: Any) -> VoCoCacheStore:
        """The store of what ``model`` (attached) compresses under its present weights, adapter and rule; with
        ``readonly=True`` also one that it can read and another adapter on its base has made
        (``adapter_stages="compress"``).

        Args:
            path: the store's folder.
            options: those of the constructor.

        Raises:
            ValueError: the model is not attached.
        """
        return cls(path, fingerprint=fingerprint_of(model, bool(options.get("readonly"))), **options)

    # -- what it is

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What its caches were made by; ``num_tokens`` is the K that :meth:`key_of` takes by itself."""
        own = self._options["fingerprint"] or {}
        return {**self._meta.fingerprint, **{k: v for k, v in own.items() if k == "num_tokens"}}

    @property
    def values(self) -> str:
        """``"keep"`` or ``"int8"``."""
        return self._meta.values

    @property
    def max_bytes(self) -> int | None:
        """Bytes its records may take, as it was when the store was opened."""
        return self._meta.max_bytes

    def key_of(self, image: Any, num_tokens: int | None = None) -> str:
        """The key of an image (PIL, path, bytes) compressed into ``num_tokens`` by this store's model.

        Raises:
            BadImageError: the image cannot be read.
            ValueError: ``num_tokens`` is left out and the store was opened without a fingerprint.
        """
        made_by = self.fingerprint
        key = image_key(image, made_by, num_tokens)
        self._given.note(key, made_by["num_tokens"] if num_tokens is None else num_tokens)
        return key

    # -- writing

    def put(self, key: str, cache: VoCoCache) -> bool:
        """Keep ``cache``; ``False`` where the key is there already (a key stands for its content).

        Raises:
            VoCoCacheError: made by another model or rule, of another K than :meth:`key_of` gave the key for,
                larger than ``max_bytes``, or not finite in a store of 8 bits.
            OSError: the disk is full, or the store is opened for reading.
        """
        return self.put_many([(key, cache)]) == 1

    def put_many(self, items: Iterable[tuple[str, VoCoCache]]) -> int:
        """Keep several ``items`` (key, cache) in one transaction, all or none; how many were new. Their bytes
        are held in memory until then.

        Raises:
            VoCoCacheError: as :meth:`put`; all of them together must fit ``max_bytes``.
        """
        records: dict[bytes, bytes] = {}
        makers: list[dict[str, Any]] = []
        for key, cache in items:
            raw = key_bytes(key)
            check_maker(self.path, self._meta, cache.fingerprint, f"the cache for {key}")
            self._given.check(key, cache.num_tokens, f"the cache for {key}")
            if cache.fingerprint not in makers:
                makers.append(cache.fingerprint)
            if raw not in records:
                records[raw] = cache_to_bytes(cache, self.values)
        return self._put_records(records, makers)

    def _put_records(self, records: Mapping[bytes, bytes], makers: Sequence[dict[str, Any]]) -> int:
        env = self._writable()
        if not records:
            return 0
        count, self._meta = put_records(env, self.path, records, makers, self._used())
        return count

    def delete(self, keys: Iterable[str]) -> int:
        """Remove the records of ``keys``; how many were there."""
        env, raw = self._writable(), [key_bytes(key) for key in keys]

        def work(txn: Any) -> int:
            index = Index(txn, env.dbs)
            count = sum(index.remove(key) for key in raw)
            index.save()
            return count

        return env.write(work)

    def prune(self, max_bytes: int) -> int:
        """Remove the records used longest ago until the rest takes at most ``max_bytes``; how many went. The
        room is used by the next puts; the file does not shrink.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} is negative; give the bytes that may stay.")
        env, touched = self._writable(), self._used()

        def work(txn: Any) -> int:
            index = Index(txn, env.dbs)
            index.touch(touched)
            count = index.evict(max_bytes)
            index.save()
            return count

        return env.write(work)

    # -- reading

    def get(self, key: str, device: str | torch.device = "cpu") -> VoCoCache:
        """The cache of ``key``, checked and copied out of the map onto ``device``.

        Raises:
            KeyError: it is not there.
            VoCoCacheError: the record was changed on the disk; the message names it.
        """
        return self.get_many([key], device)[0]

    def get_many(self, keys: Sequence[str], device: str | torch.device = "cpu") -> list[VoCoCache]:
        """The caches of ``keys`` on ``device``, from one snapshot; raises as :meth:`get` does."""
        with self._environment().read() as txn:
            found = [self._read(txn, key, copy=True)[0] for key in keys]
        self._touch(keys)
        return found if str(device) == "cpu" else [cache.to(device) for cache in found]

    @contextlib.contextmanager
    def view(self) -> Iterator[StoreView]:
        """Reads without copies: inside the block, ``view[key]`` is a cache whose tensors lie in the memory
        map. They are read-only (writing to one ends the process) and end with the block: copy what must stay
        (``cache.to("cuda")``, ``tensor.clone()``). See :class:`~voco_plugin.store.view.StoreView`.
        """
        view = None
        try:
            with self._environment().read() as txn:
                view = StoreView(lambda key: self._read(txn, key, copy=False))
                try:
                    yield view
                finally:
                    view.close()
        finally:
            if view is not None and not self._closed:
                self._touch(view.used)

    def _read(self, txn: Any, key: str, copy: bool) -> tuple[VoCoCache, int]:
        """A cache, and how many of its tensors a read without copies had to copy."""
        record = txn.get(key_bytes(key), db=self._environment().dbs["blocks"])
        if record is None:
            raise KeyError(key)
        where = f"record {key} of store {self.path}"
        parts = read_buffer(record, where, copy)
        check_maker(self.path, self._meta, parts.fingerprint, where)
        cache = cache_from_parts(parts)
        self._given.check(key, cache.num_tokens, where)
        return cache, parts.copied

    def _tokens_of(self, key: str) -> list[int]:
        with self._environment().read() as txn:
            return self._read(txn, key, copy=False)[0].num_tokens

    def _check(self, txn: Any, key: str) -> None:
        """Read a record with every check."""
        self._read(txn, key, copy=False)

    def _check_imported(self, made_by: dict[str, Any], values: str, file: str) -> None:
        check_maker(self.path, self._meta, made_by, file)
        if values != self.values:
            raise VoCoCacheError(
                f"{file} has values={values!r}, store {self.path} {self.values!r}; import it into a store of "
                "its own."
            )

    def __contains__(self, key: str) -> bool:
        with self._environment().read() as txn:
            return key_bytes(key) in Index(txn, self._environment().dbs)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not there, in the order given, each once."""
        wanted = dict.fromkeys(keys)
        with self._environment().read() as txn:
            index = Index(txn, self._environment().dbs)
            return [key for key in wanted if key_bytes(key) not in index]

    def __len__(self) -> int:
        with self._environment().read() as txn:
            return len(Index(txn, self._environment().dbs))

    def __iter__(self) -> Iterator[str]:
        """The keys in order; those put or removed meanwhile may or may not be among them."""
        after: bytes | None = None
        while True:
            chunk = []
            with self._environment().read() as txn:
                for key in Index(txn, self._environment().dbs).keys(after):
                    chunk.append(key)
                    if len(chunk) == _KEYS_AT_ONCE:
                        break
            if not chunk:
                return
            yield from (key.hex() for key in chunk)
            after = chunk[-1]

    def note_use(self, keys: Iterable[str]) -> None:
        """Count ``keys`` as used now, without reading them: somebody else reads, who cannot record it."""
        self._touch(keys)

    # -- care

    def stat(self) -> dict[str, Any]:
        """What is in it: records, bytes, limit, fingerprint, the measured error of 8 bits, readers."""
        return verify.stat(self._environment(), self.path)

    def verify(self, progress: Callable[[int], Any] | None = None) -> dict[str, Any]:
        """Read every record with every check: ``{"records", "bytes", "bad": [{"key", "reason"}], "index"}``.

        Args:
            progress: called with the number of records just read.
        """
        return verify.verify(self._environment(), self.path, self, self._check, progress)

    def note_error(self, error: dict[str, Any]) -> None:
        """Keep a measured error (:func:`~voco_plugin.store.int8_error.quantization_error`) in the
        store, for :meth:`stat`."""
        verify.note_error(self._writable(), self.path, error)

    def export(self, path: str | os.PathLike, keys: Iterable[str] | None = None) -> int:
        """Write each record (or those of ``keys``) as ``path/KEY.safetensors``, and the names of their images
        and videos beside them (``names.jsonl``, ``videos.jsonl``); how many records.
        """
        chosen = self if keys is None else keys
        count = transfer.export(
            self._environment(), Path(path), chosen, self._check, may_be_gone=keys is None
        )
        export_names(self.path, Path(path))
        return count

    def import_(self, path: str | os.PathLike) -> int:
        """Take in the folder ``path`` that :meth:`export` wrote, each file checked, and its names; how many
        records were new. A name that stands for something else here already stays what it is, with a warning.

        Raises:
            VoCoCacheError: a file is not a cache or not of this store, or the names were changed.
        """
        self._writable()
        names = read_names(Path(path))
        count = transfer.import_(Path(path), self._put_records, self._check_imported, self.max_bytes)
        import_names(self, names, self._tokens_of)
        return count

    # -- opening and closing

    def close(self) -> None:
        """Write down what was used last, and give the folder back. A closed store cannot be used."""
        if self._closed:
            return
        if self._env is not None:
            if self._env.pid == os.getpid():
                self._write_uses(self._env)
            self._env.release()
        self._env, self._closed = None, True

    def __enter__(self) -> VoCoCacheStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_env": None, "_recency": None, "_given": KeysGiven()}

    def _environment(self) -> Environment:
        """The environment of this process; opened again after a fork or in another process."""
        if self._closed:
            raise VoCoCacheError(f"store {self.path} is closed; open it again.")
        if self._env is None or self._env.pid != os.getpid():
            self._reopen()
        assert self._env is not None
        return self._env

    def _reopen(self) -> None:
        self._recency = Recency()
        self._env, self._meta = open_meta(
            self.path, readonly=self.readonly, lock=self._lock, map_size=self._map_size, **self._options
        )

    def _writable(self) -> Environment:
        if self.readonly:
            raise PermissionError(
                errno.EACCES, f"store {self.path} was opened with readonly=True; open it for writing"
            )
        return self._environment()

    def _touch(self, keys: Iterable[str]) -> None:
        if self._env is None or self._env.pid != os.getpid():
            return  # a child leaves its parent's view
        if self._recency.note(bytes.fromhex(key) for key in keys):
            self._write_uses(self._environment())

    def _used(self) -> list[bytes]:
        """Keys used since that was last written down: by readers that do not write, then by this store."""
        return take_uses(self.path) + self._recency.take()

    def _write_uses(self, env: Environment) -> None:
        if not self.readonly:
            self._recency.write(env, self._used())
        elif self._lock:
            add_uses(self.path, self._recency.take())

    def __repr__(self) -> str:
        return f"VoCoCacheStore({str(self.path)!r}, values={self.values!r}, max_bytes={self.max_bytes})"
