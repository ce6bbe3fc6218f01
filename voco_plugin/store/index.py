"""The index of a store: the size of each record, when it was used last, and the bytes of all.

    blocks   key → record                facts    key → tick, bytes
    meta     counters, description       recent   tick + key → nothing: the oldest first

A tick is a number that grows by one with each use that is written down. Everything here happens inside the
caller's transaction, so that it holds together whenever a process dies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from ..cache.container import VoCoCacheError

_PAIR = struct.Struct(">QQ")
_TICK = struct.Struct(">Q")
_COUNTERS_KEY = b"counters"


def _pair(data: Any) -> tuple[int, int]:
    """Two whole numbers of the index.

    Raises:
        VoCoCacheError: the bytes are not that: the file was damaged.
    """
    try:
        first, second = _PAIR.unpack(data)
    except struct.error:
        raise VoCoCacheError("the index of the store is damaged; `voco store verify` says more.") from None
    return first, second


class Index:
    """The index of a store inside one transaction; :meth:`save` before committing what changed."""

    def __init__(self, txn: Any, dbs: dict[str, Any]) -> None:
        self.txn, self.dbs = txn, dbs
        counters = txn.get(_COUNTERS_KEY, db=dbs["meta"])
        self.tick, self.bytes = _pair(counters) if counters is not None else (0, 0)

    def save(self) -> None:
        """Write the counters."""
        self.txn.put(_COUNTERS_KEY, _PAIR.pack(self.tick, self.bytes), db=self.dbs["meta"])

    def __contains__(self, key: bytes) -> bool:
        return self.txn.get(key, db=self.dbs["facts"]) is not None

    def __len__(self) -> int:
        return int(self.txn.stat(self.dbs["facts"])["entries"])

    def add(self, key: bytes, record: Any) -> bool:
        """Add a record as the one used last; ``False`` where the key was there (it counts as used)."""
        if key in self:
            self.touch([key])
            return False
        self.txn.put(key, record, db=self.dbs["blocks"])
        self.bytes += len(record)
        self._use(key, len(record))
        return True

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note that records were used, the last one last; keys that are gone are passed over."""
        for key in keys:
            facts = self.txn.get(key, db=self.dbs["facts"])
            if facts is not None:
                tick, size = _pair(facts)
                self.txn.delete(_TICK.pack(tick) + key, db=self.dbs["recent"])
                self._use(key, size)

    def remove(self, key: bytes) -> bool:
        """Remove a record; whether it was there."""
        facts = self.txn.get(key, db=self.dbs["facts"])
        if facts is None:
            return False
        tick, size = _pair(facts)
        self.txn.delete(_TICK.pack(tick) + key, db=self.dbs["recent"])
        self.txn.delete(key, db=self.dbs["facts"])
        self.txn.delete(key, db=self.dbs["blocks"])
        self.bytes -= min(size, self.bytes)
        return True

    def evict(self, limit: int) -> int:
        """Remove the records used longest ago until at most ``limit`` bytes are left; how many went."""
        count = 0
        while self.bytes > limit:
            cursor = self.txn.cursor(db=self.dbs["recent"])
            if not cursor.first():
                break
            key = bytes(cursor.key())[_TICK.size :]
            cursor.close()
            count += self.remove(key)
        return count

    def keys(self, after: bytes | None = None) -> Iterator[bytes]:
        """The keys in order, from the first greater than ``after``."""
        cursor = self.txn.cursor(db=self.dbs["facts"])
        there = cursor.first() if after is None else cursor.set_range(after)
        while there:
            key = bytes(cursor.key())
            if key != after:
                yield key
            there = cursor.next()

    def size_of(self, key: bytes) -> int | None:
        """Bytes of a record as noted when it was written."""
        facts = self.txn.get(key, db=self.dbs["facts"])
        return None if facts is None else int(_pair(facts)[1])

    def faults(self) -> list[str]:
        """What in the index does not hold together (nothing, unless the file was damaged)."""
        found = []
        total = records = 0
        facts_of = dict(self._all_facts())
        for _, size in facts_of.values():
            total, records = total + size, records + 1
        if total != self.bytes:
            found.append(f"its records take {total} bytes, its counter says {self.bytes}")
        for name in ("blocks", "recent"):
            entries = self.txn.stat(self.dbs[name])["entries"]
            if entries != records:
                found.append(f"{records} records are known, {name} holds {entries}")
        cursor = self.txn.cursor(db=self.dbs["recent"])
        for entry in cursor.iternext(keys=True, values=False):
            tick, key = bytes(entry[: _TICK.size]), bytes(entry[_TICK.size :])
            if key not in facts_of or _TICK.pack(facts_of[key][0]) != tick:
                found.append(f"the time of use of {key.hex()} is noted wrongly")
        return found

    def _all_facts(self) -> Iterator[tuple[bytes, tuple[int, int]]]:
        for key, facts in self.txn.cursor(db=self.dbs["facts"]):
            yield bytes(key), _pair(facts)

    def _use(self, key: bytes, size: int) -> None:
        self.tick += 1
        self.txn.put(key, _PAIR.pack(self.tick, size), db=self.dbs["facts"])
        self.txn.put(_TICK.pack(self.tick) + key, b"", db=self.dbs["recent"])
