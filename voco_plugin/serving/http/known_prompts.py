"""``KnownPrompts``: the token ids of conversations that were asked a moment ago, by their words."""

from __future__ import annotations

import threading
from collections import OrderedDict

_LONGEST, _MOST = 20_000, 2_000_000
"""Characters of one conversation, and of all together."""


class KnownPrompts:
    """Ids by what they were made of; those used longest ago make room."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def get(self, name: str) -> tuple[int, ...] | None:
        """The ids of ``name``, or ``None``."""
        with self._lock:
            found = self._ids.get(name)
            if found is not None:
                self._ids.move_to_end(name)
            return found

    def put(self, name: str, ids: tuple[int, ...]) -> None:
        """Keep ``ids``, unless ``name`` is long."""
        with self._lock:
            if len(name) > _LONGEST or name in self._ids:
                return
            self._ids[name] = ids
            self._characters += len(name)
            while self._characters > _MOST:
                gone, _ = self._ids.popitem(last=False)
                self._characters -= len(gone)

    def __len__(self) -> int:
        return len(self._ids)


__all__ = ["KnownPrompts"]
