"""The container of a saved cache: safetensors, as bytes.

    8 bytes        length of the header, little endian
    header         JSON: per tensor dtype, shape and where its bytes lie; "__metadata__": {"voco", "sha256"}
    tensor bytes   one after the other, without gaps

Reading looks at a buffer only, and takes no memory for what a header merely claims: every length, dtype,
shape and offset must agree with the bytes that are there.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = {"voco", "sha256"}
_ALIGNMENT = 8


class VoCoCacheError(ValueError):
    """What was read or given is no VoCo cache or store that can be trusted or used; the message says why."""


class Entry(NamedTuple):
    """Where a tensor's bytes lie in the buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Contents(NamedTuple):
    """The header of a container whose claims agree with its bytes."""

    metadata: dict[str, str]
    entries: dict[str, Entry]


def header_limit(size: int) -> int:
    """Bytes that the header of a container of ``size`` bytes may take.

    Parsed JSON can take 25 times its text; bound to the size of the data, what a header costs stays in
    proportion to the file that brings it.
    """
    return min((1 << 20) + size // 8, 1 << 26)


def to_chunks(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> list[Any]:
    """The container's bytes as a list of buffers: header, then the bytes of each CPU tensor."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps dtypes aligned
    header: dict[str, Any] = {"__metadata__": metadata}
    chunks, end = [], 0
    for name in order:
        tensor = tensors[name].contiguous()
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
        chunks.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = _dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > header_limit(end):
        raise VoCoCacheError(
            f"{len(text)} bytes of metadata for {end} bytes of keys and values are more than a reader takes; "
            "save the blocks in several caches."
        )
    return [struct.pack("<Q", len(text)) + text, *chunks]


def parse(view: memoryview, where: str) -> Contents:
    """The header over ``view``, checked.

    Args:
        view: all bytes of the container.
        where: the file or record it is, for messages.

    Raises:
        VoCoCacheError: not such a container, truncated, or with claims that its bytes do not bear out.
    """
    size = len(view)
    if size < 8:
        raise VoCoCacheError(f"{where} is truncated: {size} bytes hold no header.")
    (length,) = struct.unpack("<Q", view[:8])
    if length > size - 8:
        raise VoCoCacheError(
            f"{where} is truncated or not a cache: its header claims {length} of {size} bytes."
        )
    if length > header_limit(size - 8 - length):
        raise VoCoCacheError(f"{where} is not a VoCo cache: its header takes {length} of {size} bytes.")
    header = _header(bytes(view[8 : 8 + length]), where)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not _METADATA <= metadata.keys():
        raise VoCoCacheError(
            f"{where} is a safetensors file but not a VoCo cache; write it with VoCoCache.save."
        )
    if set(metadata) != _METADATA or not all(isinstance(value, str) for value in metadata.values()):
        raise VoCoCacheError(f"{where} is not a VoCo cache: its metadata holds more than a cache writes.")
    start = 8 + length
    entries = {name: _entry(name, facts, start, where) for name, facts in header.items()}
    _check_contiguous(entries.values(), start, size, where)
    return Contents(metadata, entries)


def _dumps(value: Any) -> str:
    """JSON as the safetensors library writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _header(raw: bytes, where: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
        header = json.loads(text)
        # a header that says the same in other bytes was not written by us: no byte may change unseen
        as_written = isinstance(header, dict) and _dumps(header) == text.rstrip(" ")
    except (ValueError, RecursionError):
        raise VoCoCacheError(f"{where} is not a VoCo cache: its header cannot be read.") from None
    if not as_written:
        raise VoCoCacheError(f"{where} is not a VoCo cache: its header is not written as one is.")
    return header


def _entry(name: str, facts: Any, start: int, where: str) -> Entry:
    def wrong(what: str) -> VoCoCacheError:
        return VoCoCacheError(f"{where} cannot be read: tensor {name[:80]!r} {what}.")

    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise wrong("is not described by dtype, shape and offsets")
    dtype = DTYPES.get(facts["dtype"]) if isinstance(facts["dtype"], str) else None
    if dtype is None:
        raise wrong(f"has dtype {str(facts['dtype'])[:20]!r}, which no cache holds")
    shape, offsets = facts["shape"], facts["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(n) for n in shape):
        raise wrong("has no shape of whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise wrong("has no offsets of whole numbers")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise wrong("has another number of bytes than its shape and dtype say")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _check_contiguous(entries: Iterable[Entry], start: int, size: int, where: str) -> None:
    end = start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            raise VoCoCacheError(f"{where} cannot be read: its tensors overlap or leave gaps.")
        end = entry.stop
    if end != size:
        raise VoCoCacheError(
            f"{where} is truncated or was appended to: {size} bytes where its header says {end}."
        )
