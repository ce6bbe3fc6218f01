"""Saved caches made wrong, in ways from a flipped byte to a forged header with a valid checksum.

Each function of :data:`BLIND` takes ``(rng, data, other)`` and gives bytes that the checksum no longer
covers; each of :data:`FORGED` gives bytes whose checksum was computed again, so that the checks behind it are
reached.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from typing import Any

from stores import header_of, with_header

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
_NUMBERS = (
    -1, 0, 1, 2, 3, 255, 2**31, 2**31 + 1, 2**48, 2**63, 2**64, 10**13, 10**30, -(10**30), 0.5, 1e308, True,
)  # fmt: skip
_THINGS: tuple[Any, ...] = (*_NUMBERS, None, "", "x", "F32", "int8", "../..", "\ud7ff", [], {}, [0], {"a": 1})


# -- without a thought for the checksum


def flip(rng: random.Random, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= rng.choice((1, 2, 128, rng.randrange(1, 256)))
    return bytes(out)


def flip_in_header(rng: random.Random, data: bytes, other: bytes) -> bytes:
    out, (_, end) = bytearray(data), header_of(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        out[rng.randrange(end)] = rng.choice(b'0123456789{}[]",: \t\nabF\\\x00\xff')
    return bytes(out)


def truncate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def append(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 4096)))


def splice(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A piece of another file in the place of a piece of this one, or between two."""
    start, length = rng.randrange(len(data)), rng.randrange(1, 200)
    at = rng.randrange(len(other))
    gone = rng.choice((0, length))
    return data[:start] + other[at : at + length] + data[start + gone :]


def cross(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The header of one and the tensors of another."""
    return data[: header_of(data)[1]] + other[header_of(other)[1] :]


def claim(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Another length of the header, up to what no memory holds."""
    lengths = (
        0,
        1,
        len(data) - 8,
        len(data),
        2**20,
        2**32,
        10**13,
        2**63,
        2**64 - 1,
        rng.randrange(len(data)),
    )
    return struct.pack("<Q", rng.choice(lengths)) + data[8:]


def noise(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 7, 8, 9, 100, 5000)))


def nest(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """JSON of great depth or width in the place of the header."""
    depth = rng.choice((10, 900, 1100, 5000, 100_000))
    text = rng.choice((
        b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth,
        b'{"__metadata__":' + b"[" * depth + b"]" * depth + b"}", b"[" + b"[]," * depth + b"[]]",
        b"{" + b'"a":1,' * depth + b'"b":2}', b'{"a":' + b"9" * depth + b"}", b'{"a":1e' + b"9" * 20 + b"}",
    ))  # fmt: skip
    return struct.pack("<Q", len(text)) + text + data[header_of(data)[1] :]


# -- with the checksum computed again


def sealed(header: dict, record: Any, body: bytes) -> bytes:
    """The container with this record and the checksum that its claims ask for, as far as they make sense."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict):
        return with_header(header, body)
    text = record if isinstance(record, str) else json.dumps(record, sort_keys=True)
    sha = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(set(header) - {"__metadata__"}):
        facts = header[name]
        try:
            start, stop = facts["data_offsets"]
            shape = tuple(facts["shape"])
            sha.update(f"{name}|torch.{_DTYPES[facts['dtype']]}|{shape}|".encode())
            sha.update(body[start:stop])
        except (KeyError, TypeError, ValueError):
            continue
    return with_header(
        {**header, "__metadata__": {**metadata, "voco": text, "sha256": sha.hexdigest()}}, body
    )


def _parts(data: bytes) -> tuple[dict, Any, bytes]:
    header, start = header_of(data)
    return header, json.loads(header["__metadata__"]["voco"]), data[start:]


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything within a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        found += _places(inner, (*path, name))
    return found


def _edit(rng: random.Random, value: Any) -> None:
    """Change, remove, add or repeat one thing somewhere in ``value``."""
    places = _places(value)
    if not places:
        return
    *path, last = rng.choice(places)
    for step in path:
        value = value[step]
    how = rng.randrange(6)
    if how == 0:
        del value[last]
    elif how == 1 and isinstance(value, dict):
        value[rng.choice(("more", "layers.0.key", "layers.99.value", "layers.0.key_scale", "x" * 2000))] = (
            value[last]
        )
    elif how == 1:
        value.append(value[last])
    elif how == 2 and type(value[last]) is int:
        value[last] += rng.choice((-1, 1, 2**31, -(2**31), 10**13))
    elif how == 3 and type(value[last]) is int:
        value[last] *= rng.choice((-1, 2, 10, 1000))
    else:
        value[last] = rng.choice(_THINGS)


def edit_record(rng: random.Random, data: bytes, other: bytes) -> bytes:
    header, record, body = _parts(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _edit(rng, record)
    return sealed(header, record, body)


def edit_header(rng: random.Random, data: bytes, other: bytes) -> bytes:
    header, record, body = _parts(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _edit(rng, header)
    return sealed(header, record, body)


def edit_tensors(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Other bytes below an honest header: what a writer of other values would have saved."""
    header, record, body = _parts(data)
    return sealed(header, record, rng.randbytes(len(body)))


def reshape(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Shapes and dtypes that take the same bytes."""
    header, record, body = _parts(data)
    for name in list(header):
        if name != "__metadata__" and rng.random() < 0.7:
            shape = header[name]["shape"]
            how = rng.randrange(4)
            if how == 0:
                rng.shuffle(shape)
            elif how == 1 and shape[-1] % 2 == 0:
                header[name]["shape"] = [shape[0], shape[1] * 2, shape[2] // 2]
            elif how == 2:
                header[name]["shape"] = [*shape, 1]
            elif header[name]["dtype"] in ("F16", "BF16"):
                header[name]["dtype"] = rng.choice(("F16", "BF16"))
    return sealed(header, record, body)


def huge(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Claims of terabytes that agree with one another, but not with the bytes there."""
    header, record, body = _parts(data)
    names = [name for name in header if name != "__metadata__"]
    tokens = rng.choice((10**6, 10**9, 10**12))
    if isinstance(record.get("blocks"), list) and record["blocks"]:
        record["blocks"][0]["num_tokens"] += tokens
    end = 0
    for name in names:
        shape = header[name]["shape"]
        shape[0] += tokens
        size = shape[0] * shape[1] * shape[2] * {"F64": 8, "F32": 4, "I8": 1}.get(header[name]["dtype"], 2)
        header[name]["data_offsets"], end = [end, end + size], end + size
    if rng.random() < 0.3:
        record["num_rows"] = 10**12
    if rng.random() < 0.3 and "group" in record:
        record["group"] = rng.choice((2**16, 2**40))
    return sealed(header, record, body)


def exchange(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The record of another file above these tensors."""
    header, _, body = _parts(data)
    return sealed(header, _parts(other)[1], body)


def rewrite(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The same said otherwise: spaces, escapes, order, repeated names."""
    header, record, body = _parts(data)
    honest = json.dumps(record, sort_keys=True)
    text = rng.choice((
        json.dumps(record), json.dumps(record, sort_keys=True, indent=1), " " + honest,
        honest.replace("blocks", "\\u0062locks"), honest[:-1] + ', "rows": []}', "null", "[]", "NaN", "{", "",
    ))  # fmt: skip
    return sealed(header, text, body)


BLIND = (flip, flip_in_header, truncate, append, splice, cross, claim, noise, nest)
FORGED = (edit_record, edit_header, edit_tensors, reshape, huge, exchange, rewrite)
