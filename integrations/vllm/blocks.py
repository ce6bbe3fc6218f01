"""``BlockMemory``: what was read from the store last, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict

from voco_plugin import VoCoBlock, VoCoCache, VoCoCacheError, VoCoCacheStore

from .request import RequestRefused


class BlockMemory:
    """Blocks by key, out of memory or the store.

    Args:
        store: open for reading.
        max_bytes: of keys and values that stay in memory; those used longest ago go first. 0: none stay.

    Attributes:
        hits, misses: how often a key was in memory, and was not.
        nbytes: what is in memory now.
    """

    def __init__(self, store: VoCoCacheStore, max_bytes: int) -> None:
        self.store, self.max_bytes = store, max_bytes
        self.hits = self.misses = self.nbytes = 0
        self._kept: OrderedDict[str, VoCoCache] = OrderedDict()

    def block(self, key: str, index: int) -> VoCoBlock:
        """Block ``index`` of the cache of ``key``.

        Raises:
            RequestRefused: there is no such key or block, or the record is damaged or of another model.
        """
        cache = self._cache(key)
        if index >= len(cache):
            raise RequestRefused(f"block {index} of key {key} is not there: its cache holds {len(cache)}.")
        return cache.blocks[index]

    def _cache(self, key: str) -> VoCoCache:
        cache = self._kept.get(key)
        if cache is not None:
            self.hits += 1
            self._kept.move_to_end(key)
            return cache
        self.misses += 1
        try:
            cache = self.store.get(key)
        except KeyError:
            raise RequestRefused(
                f"key {key} is not in store {self.store.path}: it was never put there, or made room for "
                "others; compress the image again."
            ) from None
        except VoCoCacheError as error:
            raise RequestRefused(str(error)) from error
        if cache.nbytes <= self.max_bytes:
            self._kept[key] = cache
            self.nbytes += cache.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return cache
