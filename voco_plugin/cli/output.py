"""What a command prints: results on stdout, progress and errors on stderr.

The one file of the package that calls ``print``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_WIDTH = 80


def emit(text: str = "") -> None:
    """A line of the result, on stdout."""
    print(text, flush=True)


def emit_json(value: Any) -> None:
    """The result for a program: one JSON value on stdout."""
    plain = "utf" not in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    print(json.dumps(value, indent=2, ensure_ascii=plain, default=str), flush=True)


def print_anything() -> None:
    """Let a terminal or a pipe that lacks a character ("→" under cp1252) get its number instead: no command
    fails, its work done, because of what it prints.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def note(text: str) -> None:
    """A word to the person at the terminal, on stderr, out of the way of the result."""
    print(text, file=sys.stderr, flush=True)


def error(command: str, problem: BaseException | str) -> None:
    """One line on stderr: the command and what is wrong, line breaks taken out."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    print(f"{command}: error: {text}", file=sys.stderr, flush=True)


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """Columns lined up: text to the left, numbers (of two decimals where they are floats) to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(_is_number(row[i]) for row in cells) for i in range(len(header))] if cells else []
    widths = [max(len(h), *(len(row[i]) for row in cells)) if cells else len(h) for i, h in enumerate(header)]
    lines = [[h for h in header], ["-" * w for w in widths], *cells]
    out = []
    for row in lines:
        parts = [
            value.rjust(width) if cells and right else value.ljust(width)
            for value, width, right in zip(row, widths, numeric or [False] * len(header), strict=True)
        ]
        out.append("  ".join(parts).rstrip())
    return "\n".join(out)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return (
        text == "-"
        or text.replace(".", "", 1).replace("-", "", 1).replace("%", "").replace(",", "").isdigit()
    )


def progress(
    items: Iterable[Any] | None = None, *, total: int | None = None, unit: str, quiet: bool = False
) -> Any:
    """A tqdm bar on stderr, drawn only on a terminal (a log file gets no bars) and not at all when
    ``quiet``."""
    from tqdm import tqdm

    known = width() != 0  # some terminals (a recorded session) do not say how wide they are
    return tqdm(
        items, total=total, unit=unit, disable=True if quiet else None, dynamic_ncols=known,
        ncols=None if known else _WIDTH,
    )  # fmt: skip


def width() -> int | None:
    """Columns of the terminal behind stderr, 0 where it does not say; ``None`` where there is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return None


def status(text: str, quiet: bool = False) -> None:
    """What takes the next seconds, on stderr, for a person at a terminal alone."""
    if not quiet and sys.stderr.isatty():
        note(text)


def size_words(before: float, after: float, than: str | None = None) -> str:
    """``16 times smaller``, ``1.3 times larger`` or ``the same size``, for bytes.

    Args:
        than: what ``before`` is of, to be named.
    """
    larger = after > before
    ratio = after / before if larger else before / after
    shown = f"{ratio:.{0 if ratio >= 9.95 else 1}f}".removesuffix(".0")
    if shown == "1":
        return "the same size" + (f" as {than}" if than else "")
    return f"{shown} times {'larger' if larger else 'smaller'}" + (f" than {than}" if than else "")


def human_bytes(count: float) -> str:
    """``1536`` → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
