"""The text that may stand before the image in a question's message, to measure what text in front costs."""

from __future__ import annotations

import os
from pathlib import Path

_FILES = (".txt", ".md")


def read_text_before(given: str) -> str:
    """The text that ``given`` is, or that the file of this name holds, without outer space.

    Raises:
        FileNotFoundError: it looks like a file's name, and there is no such file.
        ValueError: there is no text.
    """
    text = given
    if _is_file(given):
        text = Path(given).expanduser().read_text(encoding="utf-8")
    elif looks_like_a_file(given):
        raise FileNotFoundError(
            f"text before the image: {given} is no file; give one that is there, or the text itself."
        )
    if not text.strip():
        raise ValueError(f"text before the image: {given!r} has no text; leave it out for none.")
    return text.strip()


def looks_like_a_file(given: str) -> bool:
    """Whether ``given`` is one word that is written as paths are."""
    return len(given.split()) == 1 and (os.sep in given or given.lower().endswith(_FILES))


def content_of(given: str) -> str:
    """As :func:`read_text_before`, for keys: what is not there, or no text, counts as it is written."""
    try:
        return read_text_before(given)
    except (FileNotFoundError, ValueError):
        return given


def _is_file(given: str) -> bool:
    try:
        return Path(given).expanduser().is_file()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a paragraph is too long for a name, or holds what no name does
        return False
