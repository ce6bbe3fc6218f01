"""Where finished caches go: a store on this machine, Parquet shards, or both.

A sink says what it has, by an image's name (no pixel is read) or by its key, and takes finished images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...cache import VoCoCache
from ...cache.fingerprint import as_told
from ..names import NameEntry, StoreNames
from ..shards import ShardFolder, ShardWriter, check_same_maker, shard_names
from ..video_series import Series, write_series


@dataclass(frozen=True)
class Finished:
    """Images of the same pixels: their names, and the cache all of them share."""

    names: Sequence[NameEntry]
    key: str
    cache: VoCoCache


class Sink(Protocol):
    """What the job asks of a place for caches."""

    made_by: dict[str, Any]
    """What the keys there are made with."""

    def entry(self, name: str, num_tokens: int) -> NameEntry | None:
        """The entry of a name, where its cache is there, too."""

    def has(self, key: str) -> bool:
        """Whether the cache of a key is there."""

    def write(self, finished: Sequence[Finished]) -> int:
        """Take a batch; the bytes of caches that were new."""

    def name(self, entries: Sequence[NameEntry]) -> None:
        """More names of caches that are there."""

    def keep_series(self, series: Series) -> None:
        """Which of the images make a video."""

    def close(self) -> None:
        """Write what waits."""


class StoreSink:
    """A ``VoCoCacheStore`` and the names beside it. A batch is one transaction; names follow it."""

    def __init__(self, store: Any) -> None:
        self.store, self.made_by = store, store.fingerprint
        self.names = StoreNames(store.path)

    def entry(self, name: str, num_tokens: int) -> NameEntry | None:
        found = self.names.get(name, num_tokens)
        return found if found is not None and found.key in self.store else None

    def has(self, key: str) -> bool:
        return key in self.store

    def read(self, key: str) -> VoCoCache | None:
        """The cache of a key, where it is there."""
        try:
            return self.store.get(key)
        except KeyError:
            return None

    def write(self, finished: Sequence[Finished]) -> int:
        fresh = set(self.store.missing(one.key for one in finished))
        new = [one for one in finished if one.key in fresh]
        self.store.put_many([(one.key, one.cache) for one in finished])
        self.name([entry for one in finished for entry in one.names])
        return sum(one.cache.nbytes for one in new)

    def name(self, entries: Sequence[NameEntry]) -> None:
        self.names.put_many(entries)

    def keep_series(self, series: Series) -> None:
        write_series(self.store.path, series)

    def close(self) -> None:
        self.names.close()


class ShardSink:
    """Parquet shards under a prefix. What was there at the start is known; of what other processes write
    meanwhile nothing is: the same pixels under two names may then lie in two shards.

    Raises:
        VoCoCacheError: what is there was made by another model.
    """

    def __init__(self, url: str, fingerprint: dict[str, Any], shard_bytes: int) -> None:
        self.folder = ShardFolder(url)
        self.made_by = fingerprint
        """As the shards that were there have it."""
        self.writer = ShardWriter(self.folder, fingerprint, shard_bytes)
        self.keys: set[str] = set()
        self.entries: dict[tuple[str, int], NameEntry] = {}
        for entry, made_by in shard_names(self.folder):
            check_same_maker(fingerprint, made_by, url)
            self.made_by = as_told(self.made_by, [made_by])
            self._know(entry)

    def entry(self, name: str, num_tokens: int) -> NameEntry | None:
        return self.entries.get((name, num_tokens))

    def has(self, key: str) -> bool:
        return key in self.keys

    def write(self, finished: Sequence[Finished]) -> int:
        new = 0
        for one in finished:
            for entry in one.names:
                fresh = one.key not in self.keys
                self.writer.add(entry, one.cache if fresh else None)
                new += fresh * one.cache.nbytes
                self._know(entry)
        return new

    def name(self, entries: Sequence[NameEntry]) -> None:
        for entry in entries:
            if self.entries.get((entry.name, entry.num_tokens)) != entry:
                self.writer.add(entry, None)
                self._know(entry)

    def keep_series(self, series: Series) -> None:
        """Nothing: names and times are in the names of the frames, which a reader of shards sees all."""

    def close(self) -> None:
        self.writer.flush()

    def _know(self, entry: NameEntry) -> None:
        self.keys.add(entry.key)
        self.entries[entry.name, entry.num_tokens] = entry
