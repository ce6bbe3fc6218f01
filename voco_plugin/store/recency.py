"""Which records were used last: collected, and written in batches, so that reading takes no lock."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from ..cache.container import VoCoCacheError
from .env import Environment
from .index import Index

logger = logging.getLogger(__name__)

BATCH = 1024
"""Keys used before they are written down. A reader that is killed loses at most these, of the order only."""


class Recency:
    """Keys in the order of their use, the last one last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[bytes, None] = {}

    def note(self, keys: Iterable[bytes]) -> bool:
        """Note a use; whether it is time to write."""
        with self._lock:
            for key in keys:
                self._keys.pop(key, None)
                self._keys[key] = None
            return len(self._keys) >= BATCH

    def take(self) -> list[bytes]:
        """What was noted, which is then forgotten."""
        with self._lock:
            keys, self._keys = list(self._keys), {}
            return keys

    @staticmethod
    def write(env: Environment, keys: Sequence[bytes]) -> None:
        """Write down that ``keys`` were used. Reading goes on where that is not possible (a full disk): only
        the order of eviction suffers, and a warning says so.
        """
        if not keys:
            return

        def work(txn: Any) -> None:
            index = Index(txn, env.dbs)
            index.touch(keys)
            index.save()

        try:
            env.write(work)
        except (OSError, VoCoCacheError) as error:
            logger.warning("what was used last in store %s could not be noted: %s", env.path, error)
