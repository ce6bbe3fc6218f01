"""Series of a store: which of its images, in which order and at which times, make a video.

A JSON file a series in the store's folder (``STORE/series``), named by sha256(K and the video's name) and
written whole or not at all. The last compression of a video under one K replaces the series before; the
blocks of both stay in the store.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cache.container import VoCoCacheError
from ..files import atomic_write_text

FOLDER = "series"
FORMAT = 1


@dataclass(frozen=True)
class Series:
    """A video in a store.

    Attributes:
        name: of the video, as its source calls it.
        num_tokens: K its frames were compressed into.
        frames: names of its frames in the store, in order.
        times: their seconds.
        sampling: how the frames were chosen, in words.
        broken: why it ends before the video's end; ``None`` where it does not.
    """

    name: str
    num_tokens: int
    frames: tuple[str, ...]
    times: tuple[float, ...]
    sampling: str = ""
    broken: str | None = None


def write_series(store: str | os.PathLike, series: Series) -> None:
    """Keep a series; one of the same name and K is replaced."""
    target = _place(store, series.name, series.num_tokens)
    atomic_write_text(target, json.dumps({"format": FORMAT, **asdict(series)}, sort_keys=True) + "\n")


def read_series(store: str | os.PathLike, name: str, num_tokens: int) -> Series | None:
    """The series of a video under K; ``None`` where there is none.

    Raises:
        VoCoCacheError: its file was changed, or is of another format.
    """
    path = _place(store, name, num_tokens)
    if not path.is_file():
        return None
    found = _read(path)
    if (found.name, found.num_tokens) != (name, num_tokens):
        raise VoCoCacheError(f"{path} is the series of {found.name!r}, not of {name!r}.")
    return found


def all_series(store: str | os.PathLike) -> Iterator[Series]:
    """The series of a store, in no order."""
    for path in Path(store, FOLDER).glob("*.json"):
        yield _read(path)


def _read(path: Path) -> Series:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        return series_from(value)
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise VoCoCacheError(
            f"{path} is no series of a video ({problem}): compress the video again."
        ) from None


def series_from(value: dict[str, Any]) -> Series:
    """A series from what ``dataclasses.asdict`` gives of one, after JSON.

    Raises:
        ValueError, TypeError, KeyError: it is not that.
    """
    value = dict(value)
    frames, times = value.pop("frames"), value.pop("times")
    found = Series(frames=tuple(map(str, frames)), times=tuple(map(float, times)), **value)
    if len(found.frames) != len(found.times) or not found.frames:
        raise ValueError(f"it has {len(found.frames)} frames and {len(found.times)} times")
    if not isinstance(found.name, str) or type(found.num_tokens) is not int:
        raise ValueError("its name is no text, or its K no number")
    return found


def _place(store: str | os.PathLike, name: str, num_tokens: int) -> Path:
    key = hashlib.sha256(f"{num_tokens}\0{name}".encode("utf-8", "surrogateescape")).hexdigest()
    return Path(store, FOLDER, f"{key}.json")
