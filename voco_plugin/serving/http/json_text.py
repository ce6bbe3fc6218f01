"""JSON as text: written as every parser takes it, and read without guessing.

``json`` takes more than JSON is: ``NaN``, one key twice, numbers of any length. A request that holds such a
thing means something else to whoever wrote it, so it is refused.
"""

from __future__ import annotations

import json
import math
from typing import Any

_DIGITS = 40
_EXACT = 2**53


def dump(value: Any) -> str:
    """``value`` as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def load(data: bytes) -> Any:
    """What ``data`` says.

    Raises:
        ValueError: it is not JSON, or holds a number, key or text that is none; the message says where.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"the body is not UTF-8 (byte {problem.start}); send JSON in UTF-8.") from None
    if not text.strip():
        raise ValueError("the body is empty; send a JSON object.")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_int, parse_float=_float
        )
    except json.JSONDecodeError as problem:
        raise ValueError(
            f"the body is not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}; send a "
            "JSON object."
        ) from None
    except RecursionError:
        raise ValueError("the body is nested too deeply; send a flatter object.") from None
    if "\\u" in text:
        _check_text(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the body holds {twice[:40]!r} twice in one object; send it once.")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"the body holds {name}, which is no JSON number; send a finite one.")


def _int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"the body holds a number of {len(digits)} digits; send a smaller one.")
    return int(digits)


def _float(digits: str) -> float:
    """A whole number written with a point is a whole number: JSON knows one kind."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the body holds {digits[:20]}, which no float can hold; send a smaller one.")
    return int(value) if value.is_integer() and abs(value) < _EXACT else value


def _check_text(value: Any) -> None:
    """Half a surrogate pair (``\\ud800``) is no character, and no tokenizer takes it."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("the body holds half a surrogate pair; send whole characters.") from None
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one


__all__ = ["dump", "load"]
