"""Names in and out of a store as text, beside the records of :mod:`.transfer`.

    FOLDER/names.jsonl     {"name", "num_tokens", "key", "stamp"}, a line an image
    FOLDER/videos.jsonl    {"name", "num_tokens", "frames", "times", "sampling", "broken"}, a line a video

Only names whose records lie in the folder are written. They are no part of a record: a folder without these
files is imported as it is.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..cache.container import VoCoCacheError
from ..files import atomic_write_text
from .keys import key_bytes
from .names import NameEntry, Records, StoreNames, check_tokens
from .video_series import Series, all_series, read_series, series_from, write_series

NAMES, VIDEOS = "names.jsonl", "videos.jsonl"


class ExportedNames(NamedTuple):
    """What an exported folder says of names."""

    images: list[NameEntry]
    videos: list[Series]


def export_names(store: Path, folder: Path) -> None:
    """Write the names of the records in ``folder``; those of an earlier export there are replaced.

    Raises:
        VoCoCacheError: an entry of the store was changed since it was written.
    """
    with StoreNames(store, readonly=True) as known:
        images = [entry for entry in known if (folder / f"{entry.key}.safetensors").is_file()]
    there = {(entry.name, entry.num_tokens) for entry in images}
    videos = [
        video for video in all_series(store) if all((f, video.num_tokens) in there for f in video.frames)
    ]
    _write(folder / NAMES, images)
    _write(folder / VIDEOS, videos)


def _write(path: Path, rows: Sequence[NameEntry | Series]) -> None:
    if rows or path.exists():
        ordered = sorted(rows, key=lambda row: (row.name, row.num_tokens))
        atomic_write_text(path, "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in ordered))


def read_names(folder: Path) -> ExportedNames:
    """The names in an exported folder; none where it has no such files.

    Raises:
        VoCoCacheError: a line is not what :func:`export_names` writes; the message names it.
    """
    return ExportedNames(
        [_image(line, where) for line, where in _lines(folder / NAMES)],
        [_video(line, where) for line, where in _lines(folder / VIDEOS)],
    )


def import_names(store: Records, names: ExportedNames, tokens_of: Callable[[str], list[int]]) -> None:
    """Give the records of a store the names of an exported folder. One whose record is not in the store is
    left out; one that stands for something else here already is, too, with a warning.

    Args:
        tokens_of: K of each block of the record of a key.

    Raises:
        VoCoCacheError: a name is that of a record of another K.
    """
    if not names.images and not names.videos:
        return
    new: list[NameEntry] = []
    taken: list[str] = []
    with StoreNames(store.path) as known:
        for entry in names.images:
            before = known.get(entry.name, entry.num_tokens)
            if before is not None and before.key != entry.key:
                taken.append(entry.name)
            elif entry.key in store:
                check_tokens(tokens_of(entry.key), entry, f"store {store.path}")
                new.append(entry)
        known.put_many(new)
    for video in names.videos:
        old = read_series(store.path, video.name, video.num_tokens)
        if old is not None and old != video:
            taken.append(video.name)
        elif not any(name in taken for name in video.frames):
            write_series(store.path, video)
    if taken:
        warnings.warn(
            f"{len(taken)} name(s) stand for something else in store {store.path} already and stay that, "
            f"{taken[0]!r} first; import into a store of its own to have both.",
            stacklevel=3,
        )


def _image(line: dict[str, Any], where: str) -> NameEntry:
    try:
        entry = NameEntry(**line)
        key_bytes(entry.key)
        typed = isinstance(entry.name, str) and isinstance(entry.stamp, str | None)
        if not typed or type(entry.num_tokens) is not int or entry.num_tokens < 1:
            raise TypeError
    except (TypeError, VoCoCacheError):
        raise VoCoCacheError(f"{where} is no name of an image; import takes what export wrote.") from None
    return entry


def _video(line: dict[str, Any], where: str) -> Series:
    try:
        return series_from(line)
    except (ValueError, TypeError, KeyError) as problem:
        raise VoCoCacheError(f"{where} is no video ({problem}); import takes what export wrote.") from None


def _lines(path: str | os.PathLike) -> Iterator[tuple[dict[str, Any], str]]:
    if not Path(path).is_file():
        return
    with open(path, encoding="utf-8") as stream:
        try:
            for number, text in enumerate(stream, start=1):
                value = json.loads(text)
                if not isinstance(value, dict):
                    raise ValueError
                yield value, f"{path}, line {number},"
        except (ValueError, RecursionError):
            raise VoCoCacheError(f"{path} is no file of names; import takes what export wrote.") from None
