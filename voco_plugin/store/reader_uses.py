"""What readers that do not write have used: ``STORE/uses.txt``, a key a line, until a writer takes it in.

A line that is no key is passed over, so that a reader that was killed while it wrote costs one line. Only the
order of eviction hangs on this file: where it cannot be written (a folder that may only be read), nothing is
noted, and no read fails.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FILE = "uses.txt"
_KEPT = 1 << 17
"""Uses kept where no writer comes: the file stays below twice so many lines (17 MB)."""

_LINE = re.compile(rb"[0-9a-f]{64}")


def add_uses(store: Path, keys: Sequence[bytes]) -> None:
    """Note that ``keys`` were used, the last one last."""
    if not keys or not (store / "data.mdb").is_file():  # a folder that is gone is not made again
        return
    with contextlib.suppress(OSError), _locked(store / FILE, create=True) as stream:
        if os.fstat(stream.fileno()).st_size > 2 * _KEPT * 65:
            kept = list(dict.fromkeys(reversed(_keys(stream.read()))))[:_KEPT]
            stream.truncate(0)
            keys = [*reversed(kept), *keys]
        stream.write(b"\n" + b"\n".join(key.hex().encode() for key in keys) + b"\n")


def take_uses(store: Path) -> list[bytes]:
    """The keys noted, the last used last; they are forgotten then."""
    if not (store / FILE).is_file():
        return []
    with contextlib.suppress(OSError), _locked(store / FILE, create=False) as stream:
        found = _keys(stream.read())
        stream.truncate(0)
        return list(dict.fromkeys(reversed(found)))[::-1]
    return []


def _keys(data: bytes) -> list[bytes]:
    return [bytes.fromhex(line.decode()) for line in data.split(b"\n") if _LINE.fullmatch(line)]


@contextlib.contextmanager
def _locked(path: Path, create: bool) -> Iterator[Any]:
    """The file, open for reading from its start and for adding at its end; no other process has it so
    meanwhile (on systems that can lock files)."""
    flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(path, flags | (os.O_CREAT if create else 0), 0o666)
    with open(handle, "r+b", buffering=0) as stream:
        with contextlib.suppress(ImportError, OSError):  # without locks a few uses may be lost
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield stream
