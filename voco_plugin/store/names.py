"""``StoreNames``: which image has which key, so that answering from a store needs no pixels.

An LMDB environment of its own in the store's folder (``STORE/names``). Many processes may read and write it;
writers take turns. A name is never a key or a path: entries lie under sha256(K and name).

    value   8 bytes of sha256 over the rest, then JSON {"name", "num_tokens", "key", "stamp"}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ..cache.cache import VoCoCache
from ..cache.container import VoCoCacheError
from ..config import nearest
from .env import Environment, acquire
from .video_series import all_series, read_series

FOLDER = "names"
_MAP_BYTES = 1 << 26
_SUGGEST_AMONG = 10_000
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class NameEntry:
    """An image's name, and the key of its cache.

    Attributes:
        name: as its source calls it.
        num_tokens: K it was compressed into.
        key: 64 hex digits, in the store.
        stamp: of the source when the pixels were read; ``None`` where it had none.
    """

    name: str
    num_tokens: int
    key: str
    stamp: str | None = None


class Records(Protocol):
    """What names need of a ``VoCoCacheStore``."""

    path: Path

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def __contains__(self, key: str) -> bool: ...

    def get(self, key: str) -> VoCoCache: ...


class StoreNames:
    """The names of a store. A context manager; open it once per process.

    Args:
        store: the store's folder.
        readonly: only look names up.

    Raises:
        FileNotFoundError: the store does not exist.
    """

    def __init__(self, store: str | os.PathLike, *, readonly: bool = False) -> None:
        folder = Path(store)
        if not folder.is_dir():
            raise FileNotFoundError(f"store {folder} does not exist; make it with `voco compress --store`.")
        self.path = folder / FOLDER
        self._environment: Environment | None = None
        if readonly and not (self.path / "data.mdb").is_file():
            return
        if not readonly:
            self.path.mkdir(exist_ok=True)
        self._environment = acquire(
            self.path, readonly=readonly, map_size=_MAP_BYTES, lock=os.access(self.path, os.W_OK)
        )

    def get(self, name: str, num_tokens: int) -> NameEntry | None:
        """The entry of a name under K, or ``None``.

        Raises:
            VoCoCacheError: the entry was changed since it was written.
        """
        if self._environment is None:
            return None
        with self._environment.read() as transaction:
            found = transaction.get(_place(name, num_tokens))
            value = None if found is None else bytes(found)
        if value is None:
            return None
        entry = self._read(value)
        if (entry.name, entry.num_tokens) != (name, num_tokens):
            raise VoCoCacheError(f"{self.path}: the entry of {name!r} is that of {entry.name!r}.")
        return entry

    def put_many(self, entries: Iterable[NameEntry]) -> None:
        """Write entries, all of them or none; an earlier entry of the same name and K is replaced."""
        values = [(_place(e.name, e.num_tokens), _packed(e)) for e in entries]
        if not values:
            return
        if self._environment is None:
            raise ValueError(f"{self.path} was opened to look up names only; open it without readonly.")
        self._environment.write(lambda transaction: [transaction.put(*value) for value in values])

    def __iter__(self) -> Iterator[NameEntry]:
        if self._environment is None:
            return
        with self._environment.read() as transaction:
            values = [bytes(value) for _, value in transaction.cursor()]
        yield from map(self._read, values)

    def __len__(self) -> int:
        if self._environment is None:
            return 0
        with self._environment.read() as transaction:
            return int(transaction.stat()["entries"])

    def close(self) -> None:
        """Give the environment back; the object cannot be used after."""
        if self._environment is not None:
            self._environment.release()
            self._environment = None

    def __enter__(self) -> StoreNames:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _read(self, value: bytes) -> NameEntry:
        head, body = value[:8], value[8:]
        try:
            if hashlib.sha256(body).digest()[:8] != head:
                raise ValueError("its checksum does not match")
            entry = NameEntry(**json.loads(body))
            if not _KEY.fullmatch(entry.key):
                raise ValueError("its key is none")
        except (ValueError, TypeError) as problem:
            raise VoCoCacheError(f"{self.path} holds an entry that was changed ({problem}).") from None
        return entry


def caches_by_name(store: Records, names: Sequence[str], num_tokens: int | None = None) -> list[VoCoCache]:
    """The caches of images by the names they were compressed under; no image is opened. The name of a video
    stands for all of its blocks, in order, in one cache.

    Args:
        num_tokens: K; the store's fingerprint's where left out.

    Raises:
        ValueError: a name is not known for this K, or its cache was evicted; the message gives the nearest.
        VoCoCacheError: an entry or a cache was changed since it was written.
    """
    tokens = num_tokens if num_tokens is not None else store.fingerprint["num_tokens"]
    found = []
    with StoreNames(store.path, readonly=True) as known:
        for name in names:
            entry = known.get(name, tokens)
            video = read_series(store.path, name, tokens) if entry is None else None
            if video is not None:
                found.append(VoCoCache.cat(caches_by_name(store, video.frames, tokens)))
                continue
            if entry is None:
                near = ""
                if len(known) <= _SUGGEST_AMONG:
                    videos = (series.name for series in all_series(store.path))
                    near = nearest(name, {e.name for e in known}.union(videos))
                raise ValueError(f"store {store.path} has no image {name!r} with K={tokens}{near}.")
            if entry.key not in store:
                raise ValueError(
                    f"the cache of {name!r} is no longer in store {store.path} (evicted, or removed): "
                    "compress it again."
                )
            cache = store.get(entry.key)
            check_tokens(cache.num_tokens, entry, f"store {store.path}")
            found.append(cache)
    return found


def check_tokens(found: Iterable[int], entry: NameEntry, where: str) -> None:
    """Raise where the record of a name is not of its K.

    Raises:
        VoCoCacheError: K differs.
    """
    wrong = sorted(set(found) - {entry.num_tokens})
    if wrong:
        raise VoCoCacheError(
            f"{where}: {entry.name!r} is named with K={entry.num_tokens}, its cache has K={wrong[0]}; "
            "compress it again."
        )


def _place(name: str, num_tokens: int) -> bytes:
    return hashlib.sha256(f"{num_tokens}\0{name}".encode("utf-8", "surrogateescape")).digest()


def _packed(entry: NameEntry) -> bytes:
    body = json.dumps(asdict(entry), sort_keys=True).encode()
    return hashlib.sha256(body).digest()[:8] + body
