"""A saved VoCo cache: its bytes, in a file or in a store's record, written and read by the same code.

layers.{l}.key, layers.{l}.value   (T, H, D), T = the K of all blocks together, block after block
metadata["voco"]                   JSON: format version, blocks, rows, fingerprint
metadata["sha256"]                 over that record and every tensor's name, dtype, shape and bytes

Format version 2 keeps the values as they are; version 3 holds them in 8 bits (:mod:`.int8`), with
``layers.{l}.key_scale`` and ``value_scale`` beside them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from .._moved import moved_name
from ..files import atomic_path
from . import container, int8
from .container import Contents, Entry, VoCoCacheError

FORMAT_VERSION, INT8_VERSION = 2, 3
VALUES = ("keep", "int8")
BLOCK_FIELDS = ("num_tokens", "position", "extent", "num_vision", "relocatable", "order")
_FIELDS = {"format_version", "blocks", "rows", "num_rows", "fingerprint"}
_INT8_FIELDS = {"values", "dtype", "group"}
_INT8_DTYPES = ("float64", "float32", "float16", "bfloat16")
_POSITIONS = 1 << 31
_MAX_ROWS = 1 << 20
_MAX_TEXT = 1000
_MAX_NAMES = 256
_EXACT = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return moved_name(__name__, name)


class Block(Protocol):
    """What is written of a block: a :class:`~voco_plugin.cache.cache.VoCoBlock`, which also has the fields of
    ``BLOCK_FIELDS``."""

    @property
    def keys(self) -> tuple[torch.Tensor, ...]: ...
    @property
    def values(self) -> tuple[torch.Tensor, ...]: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...


class Parts(NamedTuple):
    """What a saved cache holds.

    Attributes:
        blocks: the fields of each block, as ``VoCoBlock`` takes them.
        values: ``"keep"`` (bit for bit what was saved) or ``"int8"``.
        copied: tensors that a read without copies had to copy: misaligned ones, and all of ``"int8"``.
    """

    blocks: list[dict[str, Any]]
    rows: list[int]
    num_rows: int
    fingerprint: dict[str, Any]
    values: str
    copied: int


# -- writing


def to_chunks(
    blocks: Sequence[Block],
    rows: Iterable[int],
    num_rows: int,
    fingerprint: dict[str, Any],
    values: str = "keep",
) -> list[Any]:
    """The bytes of a saved cache, as a list of buffers.

    Args:
        values: ``"keep"``, or ``"int8"`` for 8 bits a value (:mod:`.int8`).

    Raises:
        ValueError: the blocks differ in layers or dtype, or ``values`` is not known.
        VoCoCacheError: the cache holds what no reader would take back.
    """
    if values not in VALUES:
        raise ValueError(f"values={values!r} is not known; use {' or '.join(VALUES)}.")
    tensors = block_tensors(blocks)
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "blocks": [{f: getattr(b, f) for f in BLOCK_FIELDS} for b in blocks],
        "rows": list(rows),
        "num_rows": num_rows,
        "fingerprint": fingerprint,
    }
    if values == "int8" and blocks:
        dtype = str(blocks[0].dtype).removeprefix("torch.")
        record |= {"format_version": INT8_VERSION, "values": "int8", "dtype": dtype, "group": int8.GROUP}
        tensors = int8.quantize(tensors)
    check_record(record, "this cache cannot be saved")
    facts = [(n, t.dtype, tuple(t.shape), bytes_of(t)) for n, t in tensors.items()]
    metadata = {"voco": json.dumps(record, sort_keys=True), "sha256": digest(facts, record)}
    return container.to_chunks(tensors, metadata)


def write_file(path: str | os.PathLike, chunks: Iterable[Any]) -> None:
    """Write ``chunks`` into a file atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        for chunk in chunks:
            stream.write(chunk)


def block_tensors(blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
    """The blocks' keys and values, on the CPU, laid out as a file has them: ``layers.{l}.key`` ``(T, H, D)``.

    Raises:
        ValueError: the blocks differ in layers or dtype.
    """
    tensors: dict[str, torch.Tensor] = {}
    if not blocks:
        return tensors
    layers = {b.num_layers for b in blocks}
    dtypes = {b.dtype for b in blocks}
    if len(layers) > 1 or len(dtypes) > 1:
        raise ValueError(f"blocks differ in layers {sorted(layers)} or dtype {sorted(map(str, dtypes))}.")
    for layer in range(layers.pop()):
        for name in ("key", "value"):
            parts = [getattr(b, f"{name}s")[layer].detach().cpu().transpose(0, 1) for b in blocks]
            tensors[f"layers.{layer}.{name}"] = torch.cat(parts).contiguous()
    return tensors


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], Any]], record: dict[str, Any]) -> str:
    """sha256 over the record and every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, dtype, shape, data in sorted(tensors, key=lambda entry: entry[0]):
        sha.update(f"{name}|{dtype}|{shape}|".encode())
        sha.update(data)
    return sha.hexdigest()


# -- reading


def read_file(path: str | os.PathLike) -> Parts:
    """What a file holds, after every check.

    Raises:
        VoCoCacheError: not a cache, truncated, changed, or of another format version.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with open(path, "rb") as stream:
        empty = os.fstat(stream.fileno()).st_size == 0
        data = b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return read_buffer(data, str(path))


def read_buffer(buffer: Any, where: str, copy: bool = True) -> Parts:
    """What ``buffer``, the bytes of a saved file, holds, after every check; see
    :func:`~voco_plugin.cache.cache.cache_from_buffer`.
    """
    view = memoryview(buffer).cast("B")
    contents = container.parse(view, where)
    record = _record(contents.metadata["voco"], where)
    _check_tensors(contents.entries, record, where)
    facts = [(n, e.dtype, e.shape, view[e.start : e.stop]) for n, e in contents.entries.items()]
    if digest(facts, record) != contents.metadata["sha256"]:
        raise VoCoCacheError(f"{where} was changed since it was written: its checksum does not match.")
    quantized = record["format_version"] == INT8_VERSION
    tensors, copied = tensors_of(view, contents, copy and not quantized)
    if quantized:
        tensors = int8.dequantize(tensors, getattr(torch, record["dtype"]), record["group"])
        copied = len(tensors)
    blocks = blocks_of(tensors, record, copy)
    values = "int8" if quantized else "keep"
    return Parts(
        blocks, list(record["rows"]), record["num_rows"], dict(record["fingerprint"]), values, copied
    )


def _record(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        as_written = json.dumps(record, sort_keys=True) == text
    except (ValueError, RecursionError, TypeError):
        raise VoCoCacheError(f"{where} is not a VoCo cache: its metadata cannot be read.") from None
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is not int or version not in (FORMAT_VERSION, INT8_VERSION):
        raise VoCoCacheError(
            f"{where} has format version {str(version)[:20]}; this release reads {FORMAT_VERSION} and "
            f"{INT8_VERSION}."
        )
    if not as_written:
        raise VoCoCacheError(f"{where} is not a VoCo cache: its metadata is not written as a cache's is.")
    check_record(record, where)
    return record


def _check_tensors(entries: dict[str, Entry], record: dict[str, Any], where: str) -> None:
    """Names, dtypes and shapes as the record has them."""

    def wrong(what: str) -> VoCoCacheError:
        return VoCoCacheError(f"{where}: tensors and metadata do not match ({what}).")

    quantized = record["format_version"] == INT8_VERSION
    kinds = ("key", "value", "key_scale", "value_scale") if quantized else ("key", "value")
    layers = len(entries) // len(kinds)
    if set(entries) != {f"layers.{n}.{kind}" for n in range(layers) for kind in kinds}:
        raise wrong("their names are not those of whole layers")
    total = sum(block["num_tokens"] for block in record["blocks"])
    if bool(layers) != bool(total):
        raise wrong(f"{layers} layers for {total} tokens")
    dtypes = {entry.dtype for name, entry in entries.items() if not name.endswith("_scale")}
    allowed = (torch.int8,) if quantized else _EXACT
    if len(dtypes) > 1 or not all(dtype in allowed for dtype in dtypes):
        raise wrong(f"dtypes {sorted(map(str, dtypes))}")
    for name, entry in entries.items():
        if len(entry.shape) != 3 or entry.shape[0] != total or 0 in entry.shape:
            raise wrong(f"{name} has shape {entry.shape}, {total} tokens are described")
        if name.endswith("_scale"):
            of = entries[name.removesuffix("_scale")].shape
            if len(of) != 3 or entry.shape != int8.scale_shape(of, record["group"]):
                raise wrong(f"{name} has shape {entry.shape} beside {of}")
            if entry.dtype != int8.SCALE_DTYPE:
                raise wrong(f"{name} is {entry.dtype}")


def tensors_of(view: memoryview, contents: Contents, copy: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors, and how many were copied although none was to be."""
    tensors, copied = {}, 0
    mapped = None if copy or not contents.entries else _writable(view)
    for name, entry in contents.entries.items():
        data, offset = mapped, entry.start
        if mapped is None or (ctypes.addressof(mapped) + entry.start) % entry.dtype.itemsize:
            data, offset = bytearray(view[entry.start : entry.stop]), 0
            copied += not copy
        count = (entry.stop - entry.start) // entry.dtype.itemsize
        flat = torch.frombuffer(data, dtype=entry.dtype, count=count, offset=offset)
        tensors[name] = flat.view(entry.shape)
    return tensors, copied


def _writable(view: memoryview) -> Any:
    """The same memory as a buffer that torch takes without its warning of read-only memory (which is given
    once a process, and could only be silenced for all threads).
    """
    import numpy as np

    array = np.frombuffer(view, dtype=np.uint8)
    mapped: Any = (ctypes.c_ubyte * len(view)).from_address(array.ctypes.data)
    mapped.owner = array  # the tensors keep `mapped`, which keeps the memory
    return mapped


def blocks_of(tensors: dict[str, torch.Tensor], record: dict[str, Any], copy: bool) -> list[dict[str, Any]]:
    """The blocks that ``record`` describes, each as the fields of a ``VoCoBlock``."""
    counts = [block["num_tokens"] for block in record["blocks"]]
    layers = sum(name.endswith(".key") for name in tensors)
    single = len(counts) == 1  # of several, a block that outlives the others would keep the memory of all
    parts = {name: (tensor,) if single else tensor.split(counts) for name, tensor in tensors.items()}

    def take(name: str, number: int) -> torch.Tensor:
        part = parts[name][number].transpose(0, 1)
        if not copy:
            return part
        return part.contiguous() if single else part.clone(memory_format=torch.contiguous_format)

    blocks = []
    for i, facts in enumerate(record["blocks"]):
        keys = tuple(take(f"layers.{n}.key", i) for n in range(layers))
        values = tuple(take(f"layers.{n}.value", i) for n in range(layers))
        blocks.append({"keys": keys, "values": values, **{f: facts[f] for f in BLOCK_FIELDS[1:]}})
    return blocks


# -- checks of the record


def check_record(record: dict[str, Any], where: str) -> None:
    """Raise where a field is missing, unknown, of another type or out of range.

    Raises:
        VoCoCacheError: the message names the field.
    """

    def wrong(what: str) -> VoCoCacheError:
        return VoCoCacheError(f"{where}: its metadata cannot be used ({what}).")

    quantized = record.get("format_version") == INT8_VERSION
    if set(record) != (_FIELDS | _INT8_FIELDS if quantized else _FIELDS):
        raise wrong("it has other fields than a cache")
    if quantized:
        if record["values"] != "int8" or record["dtype"] not in _INT8_DTYPES:
            raise wrong(f"values {record['values']!r} of dtype {record['dtype']!r}")
        if not _within(record["group"], 1, 1 << 16):
            raise wrong("group is no number of channels")
    blocks, rows, num_rows = record["blocks"], record["rows"], record["num_rows"]
    if not _within(num_rows, 0, _MAX_ROWS):
        raise wrong(f"num_rows is not within 0 and {_MAX_ROWS}")
    if not isinstance(blocks, list) or not isinstance(rows, list) or len(blocks) != len(rows):
        raise wrong("blocks and rows are not lists of one length")
    if not all(_within(row, 0, num_rows - 1) for row in rows):
        raise wrong(f"a row is not within the {num_rows} rows")
    for number, block in enumerate(blocks):
        fault = _fault_of_block(block)
        if fault:
            raise wrong(f"block {number}: {fault}")
    fault = _fault_of_fingerprint(record["fingerprint"])
    if fault:
        raise wrong(fault)


def _within(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _fault_of_block(block: Any) -> str | None:
    if not isinstance(block, dict) or set(block) != set(BLOCK_FIELDS):
        return "it has other fields than a block"
    if not _within(block["num_tokens"], 1, _POSITIONS):
        return "num_tokens is no number of tokens"
    for name in ("num_vision", "order"):
        if not _within(block[name], 0, _POSITIONS):
            return f"{name} is not within 0 and {_POSITIONS}"
    for name in ("position", "extent"):
        if not _within(block[name], -_POSITIONS, _POSITIONS):
            return f"{name} is not within ±{_POSITIONS}"
    return None if isinstance(block["relocatable"], bool) else "relocatable is neither true nor false"


def _fault_of_fingerprint(fingerprint: Any, within: int = 1) -> str | None:
    """``within``: levels of records that its entries may be (``settings``)."""
    if not isinstance(fingerprint, dict) or len(fingerprint) > _MAX_NAMES:
        return f"the fingerprint is no record of at most {_MAX_NAMES} entries"
    for name, value in fingerprint.items():
        if within and isinstance(value, dict):
            if fault := _fault_of_fingerprint(value, within - 1):
                return fault
            value = None
        texts = [text for text in (name, value) if isinstance(text, str)]
        plain = value is None or isinstance(value, (str, bool, int, float))
        if not plain or any(len(text) > _MAX_TEXT for text in texts):
            return "an entry of the fingerprint is no short text or number"
    return None
