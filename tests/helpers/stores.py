"""Made-up caches and keys for the tests of stores: no model is needed to keep and find bytes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from voco_plugin.cache import VoCoBlock, VoCoCache
from voco_plugin.store import VoCoCacheStore

MADE_BY = {
    "model": "m" * 32, "adapter": "none", "processor": "p" * 32, "name": "llava", "dtype": "float32",
    "num_tokens": 2, "rule": "isolated", "positions": "compact",
}  # fmt: skip


def key(number: int) -> str:
    """The ``number``-th key."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def made(seed: int, tokens: int = 2, layers: int = 2, dim: int = 16, dtype=torch.float32, blocks: int = 1):
    """A cache of random blocks; the same for the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def tensors():
        return tuple(torch.randn(2, tokens, dim, generator=generator).to(dtype) for _ in range(layers))

    return VoCoCache(
        [VoCoBlock(tensors(), tensors(), 5 + b, 4, 4, order=4) for b in range(blocks)],
        fingerprint={**MADE_BY, "dtype": str(dtype).removeprefix("torch.")},
    )


def opened(path: Path, **options) -> VoCoCacheStore:
    """A store of what :func:`made` makes."""
    return VoCoCacheStore(path, fingerprint=MADE_BY, **options)


def tensors_of(cache: VoCoCache) -> list[torch.Tensor]:
    return [t for block in cache for t in (*block.keys, *block.values)]


def same(a: VoCoCache, b: VoCoCache) -> bool:
    """Equal bit for bit, in everything a file keeps."""
    facts = ("position", "extent", "num_vision", "relocatable", "order", "num_tokens")
    return (
        len(a) == len(b)
        and (a.rows, a.num_rows, a.fingerprint) == (b.rows, b.num_rows, b.fingerprint)
        and all(getattr(x, f) == getattr(y, f) for x, y in zip(a, b, strict=True) for f in facts)
        and all(
            s.dtype == t.dtype and s.shape == t.shape and torch.equal(_bits(s), _bits(t))
            for s, t in zip(tensors_of(a), tensors_of(b), strict=True)
        )
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def raw_put(store: VoCoCacheStore, name: str, record: bytes) -> None:
    """Put bytes where a record is, past every check."""
    env = store._environment()
    env.write(lambda txn: txn.put(bytes.fromhex(name), record, db=env.dbs["blocks"]))


def header_of(data: bytes) -> tuple[dict, int]:
    """The JSON header of a saved cache, and where its tensors begin."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def with_header(header: dict, body: bytes) -> bytes:
    """A container with this header, as safetensors writes it."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def in_a_fork(work: Callable[[], Any], user: int | None = None) -> Any:
    """What ``work()`` gives in a forked child of this process, run as ``user``; the text of its error, or of
    the signal that ended it.
    """
    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = os.fork()
    if child == 0:
        try:
            if user is not None:
                os.setgid(user)
                os.setuid(user)
            queue.put(work())
        except BaseException as error:
            queue.put(repr(error))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else queue.get()
