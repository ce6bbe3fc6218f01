"""The answers so far, a JSON line each, so that a run that ended early asks no question twice.

A line's key is a hash of the prompt, its images (pixels, model, rule, K: a store's keys) and the generation
options: an answer is found again by what it depends on, not by its number. Lines are appended and flushed as
answers come; one that was cut off is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def log_key(facts: Any) -> str:
    """The key of what an answer depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class AnswerLog:
    """Answers by key, in a file.

    Args:
        path: made where it is not there; ``None`` keeps nothing.

    Raises:
        ValueError: the file is there and is no such log.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = None if path is None else Path(path)
        self.found: dict[str, str] = {}
        self._file: Any = None
        if self.path is None:
            return
        if self.path.is_dir():
            raise ValueError(f"answers={str(self.path)!r} is a folder; name a file.")
        self._keep: int | None = None
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        assert self.path is not None
        whole, _, cut = self.path.read_bytes().rpartition(b"\n")
        if cut:  # killed while writing
            self._keep = len(whole) + (1 if whole else 0)
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")):
            if not line:
                continue
            try:
                entry = json.loads(line)
                self.found[entry["key"]] = entry["answer"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"answers={str(self.path)!r}: line {number + 1} is none of an answer file; name another "
                    "file."
                ) from None

    def add(self, key: str, answer: str, name: str) -> None:
        """Keep an answer; on the disk when this returns."""
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._keep is not None:
                os.truncate(self.path, self._keep)
            self._file = open(self.path, "a", encoding="utf-8")
        self.found[key] = answer
        line = json.dumps({"key": key, "answer": answer, "name": name}, ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
