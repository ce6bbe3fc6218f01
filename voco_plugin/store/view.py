"""Reads of a store without copies."""

from __future__ import annotations

from collections.abc import Callable

from ..cache.cache import VoCoCache
from ..cache.container import VoCoCacheError


class StoreView:
    """Records of one snapshot, their tensors in the memory map; made by ``VoCoCacheStore.view``.

    Attributes:
        copied: tensors that had to be copied all the same: their bytes are not aligned for their dtype in
            the map (records under about 2 KB lie among others), or the store keeps 8 bits.
    """

    def __init__(self, read: Callable[[str], tuple[VoCoCache, int]]) -> None:
        self._read: Callable[[str], tuple[VoCoCache, int]] | None = read
        self.copied = 0
        self.used: dict[str, None] = {}

    def __getitem__(self, key: str) -> VoCoCache:
        """The cache of ``key``, checked.

        Raises:
            KeyError: it is not there.
            VoCoCacheError: the record was changed on the disk, or the view has ended.
        """
        if self._read is None:
            raise VoCoCacheError("this view has ended; read inside its block.")
        cache, copied = self._read(key)
        self.copied += copied
        self.used[key] = None
        return cache

    def close(self) -> None:
        """End it: nothing more can be read."""
        self._read = None
