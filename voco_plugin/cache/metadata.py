"""The record of a saved cache (JSON beside its tensors): what it may hold, checked field by field."""

from __future__ import annotations

from typing import Any

from .container import VoCoCacheError

FORMAT_VERSION, INT8_VERSION = 2, 3
BLOCK_FIELDS = ("num_tokens", "position", "extent", "num_vision", "relocatable", "order")
_FIELDS = {"format_version", "blocks", "rows", "num_rows", "fingerprint"}
_INT8_FIELDS = {"values", "dtype", "group"}
_INT8_DTYPES = ("float64", "float32", "float16", "bfloat16")
_POSITIONS = 1 << 31
_MAX_ROWS = 1 << 20
_MAX_TEXT = 1000
_MAX_NAMES = 64


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


def _fault_of_fingerprint(fingerprint: Any) -> str | None:
    if not isinstance(fingerprint, dict) or len(fingerprint) > _MAX_NAMES:
        return f"the fingerprint is no record of at most {_MAX_NAMES} entries"
    for name, value in fingerprint.items():
        texts = [text for text in (name, value) if isinstance(text, str)]
        plain = value is None or isinstance(value, (str, bool, int, float))
        if not plain or any(len(text) > _MAX_TEXT for text in texts):
            return "an entry of the fingerprint is no short text or number"
    return None
