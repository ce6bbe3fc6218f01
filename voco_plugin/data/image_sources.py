"""Where the images of a large job come from: named, found without decoding one, opened when their turn comes.

    source                                        name of an image                  random access
    image file, folder (with its subfolders)      its path                          yes
    LLaVA JSON or any JSON list / JSONL           the path its record leads to      yes
    tar (WebDataset shards), uncompressed, local  TAR/MEMBER                        yes
    tar, compressed or remote                     TAR/MEMBER                        no: read in order
    saved `datasets` folder, Parquet, CSV, hub    SOURCE[split]/ROW, /ROW/J where   yes; not when streaming
    id, `Dataset`, `IterableDataset`              a row holds a list of images

`photos/*.jpg` and `train-{0000..0031}.tar` name many files or shards. Hidden files are left out of folders.
Nothing is unpacked to disk. An image that cannot be read raises ``BadImageError`` when it is opened, not
before.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TABLE_SUFFIXES = (".parquet", ".csv")

_URL = re.compile(r"^[a-z0-9+.-]+://", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_MAX_NAMES = 10_000_000


@dataclass(frozen=True)
class ImageItem:
    """One image of a source.

    Attributes:
        name: what it is called in the source; unique within it.
        read: gives what :func:`voco_plugin.images.open_image` takes: a path, bytes, a record, a PIL image.
        stamp: changes when the image behind the name may have changed (size and time of a file, fingerprint
            of a dataset); ``None`` where nothing cheap can tell.
    """

    name: str
    read: Callable[[], Any]
    stamp: str | None = None

    def open(self) -> Any:
        """The image as 8-bit RGB.

        Raises:
            BadImageError: it is missing, broken or no image; the message names it.
        """
        from ..images import BadImageError, open_image

        try:
            found = self.read()
        except (OSError, ValueError) as problem:
            raise BadImageError(f"{self.name}: image cannot be read: {problem}.") from None
        return open_image(found, None if isinstance(found, (str, os.PathLike)) else self.name)


class ImageSource:
    """Images in order. ``len`` and ``[i]`` work where ``random_access`` says so; iteration always does."""

    random_access = True

    def __iter__(self) -> Iterator[ImageItem]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        raise TypeError(f"a {type(self).__name__} does not know its length before it is read")

    def __getitem__(self, index: int) -> ImageItem:
        raise TypeError(f"a {type(self).__name__} is read in order")

    def share(self, rank: int, world: int) -> Iterator[ImageItem]:
        """Every ``world``-th image, from number ``rank`` on: what one of ``world`` processes takes."""
        if self.random_access:
            return (self[i] for i in range(rank, len(self), world))
        return itertools.islice(iter(self), rank, None, world)

    def share_length(self, rank: int, world: int) -> int | None:
        """How many images :meth:`share` gives; ``None`` where only reading would tell."""
        return len(range(rank, len(self), world)) if self.random_access else None


class FileImages(ImageSource):
    """Image files (or URLs); a name that comes twice is one image."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(dict.fromkeys(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageItem:
        path = self.paths[index]
        return ImageItem(path, lambda: path, file_stamp(path))


class JoinedImages(ImageSource):
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = list(sources)
        self.random_access = all(source.random_access for source in sources)
        self.ends = list(itertools.accumulate(map(len, sources))) if self.random_access else []

    def __iter__(self) -> Iterator[ImageItem]:
        return itertools.chain.from_iterable(self.sources)

    def __len__(self) -> int:
        return (self.ends or [0])[-1] if self.random_access else super().__len__()

    def __getitem__(self, index: int) -> ImageItem:
        if not self.random_access:
            return super().__getitem__(index)
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} is outside the {len(self)} of this source.")
        number = bisect.bisect_right(self.ends, index)
        return self.sources[number][index - (self.ends[number - 1] if number else 0)]


class PickedImages(ImageSource):
    """Some images of a source with random access, by their numbers."""

    def __init__(self, source: ImageSource, numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> ImageItem:
        return self.source[self.numbers[index]]


def image_source(
    source: Any,
    *,
    split: str | None = None,
    image_column: str | None = None,
    image_folder: str | Path | None = None,
    streaming: bool = False,
    missing: bool = False,
) -> ImageSource:
    """The images of ``source``; see the module for what may stand there.

    Args:
        source: a path, a pattern, a hub id, a ``Dataset`` or ``IterableDataset``, an :class:`ImageSource`, or
            a list of such.
        split: of a dataset; ``None`` takes the only one, or ``train``.
        image_column: of a dataset or JSON records; ``None`` takes the one column that holds images.
        image_folder: where the image names of a JSON file start; ``None``: beside the file, or its
            ``images/``.
        streaming: read a dataset as a stream, without keeping a copy of it.
        missing: whether a named image file that does not exist is kept, to be found missing when it is
            opened.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no image, or cannot be read as a source.
    """
    options: dict[str, Any] = {
        "split": split, "image_column": image_column, "image_folder": image_folder,
        "streaming": streaming, "missing": missing,
    }  # fmt: skip
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, (list, tuple)):
        return _joined([image_source(one, **options) for one in source])
    if not isinstance(source, (str, os.PathLike)):
        from .dataset_images import dataset_images

        return dataset_images(source, image_column=image_column)
    names = expand(os.fspath(source))
    return _joined([_one(name, options) for name in names])


def _joined(found: list[ImageSource]) -> ImageSource:
    """One source; neighbours that are plain files become one, so that a million names stay a list."""
    merged: list[ImageSource] = []
    for source in found:
        if type(source) is FileImages and merged and type(merged[-1]) is FileImages:
            merged[-1].paths += source.paths
        else:
            merged.append(source)
    for source in merged:
        if type(source) is FileImages:
            source.paths = list(dict.fromkeys(source.paths))
    return merged[0] if len(merged) == 1 else JoinedImages(merged)


def expand(pattern: str) -> list[str]:
    """The names a brace and glob pattern stands for; a plain name is itself. An existing file of that very
    name wins.

    Raises:
        FileNotFoundError: a glob matches nothing.
        ValueError: a brace range that stands for more than ten million names.
    """
    if os.path.lexists(os.path.expanduser(pattern)):
        return [pattern]
    names = _braces(pattern)
    found: list[str] = []
    for name in names:
        if _URL.match(name) or not glob.has_magic(name):
            found.append(name)
            continue
        matches = sorted(glob.glob(os.path.expanduser(name), recursive=True))
        if not matches:
            raise FileNotFoundError(f"nothing matches {name}.")
        found += matches
    return found


def _braces(text: str) -> list[str]:
    match = _BRACES.search(text)
    if match is None:
        return [text]
    inside = _RANGE.match(match[1])
    if inside is None:
        parts = match[1].split(",")
    else:
        low, high = int(inside[1]), int(inside[2])
        if high - low >= _MAX_NAMES:
            raise ValueError(f"{text} stands for {high - low + 1} names; give fewer.")
        width = len(inside[1]) if inside[1].startswith("0") else 0
        parts = [str(i).zfill(width) for i in range(low, high + 1)]
    head, tail = text[: match.start()], _braces(text[match.end() :])
    return [head + part + rest for part in parts for rest in tail]


def _one(name: str, options: Mapping[str, Any]) -> ImageSource:
    """The source that one name without a pattern stands for."""
    from .dataset_images import dataset_images, load_dataset_of

    path = Path(name).expanduser()
    lower = name.lower()
    if lower.endswith(TAR_SUFFIXES):
        from .tar_images import tar_images

        return tar_images(name)
    if _URL.match(name) and lower.endswith(IMAGE_SUFFIXES):
        return FileImages([name])
    if path.is_dir():
        return _folder(path, options)
    if lower.endswith((".json", ".jsonl")):
        if not path.is_file():
            raise FileNotFoundError(f"{name} does not exist.")
        return FileImages(_json_names(path, options["image_column"], options["image_folder"]))
    if path.is_file() and not lower.endswith(TABLE_SUFFIXES):
        return FileImages([str(path)])  # whatever its name: opening it says whether it is an image
    if lower.endswith(IMAGE_SUFFIXES):
        if not options["missing"]:
            raise FileNotFoundError(f"image {name} does not exist.")
        return FileImages([str(path)])
    if not path.is_file() and not _HUB_ID.match(name):
        raise FileNotFoundError(f"{name} does not exist.")
    data = load_dataset_of(name, split=options["split"], streaming=options["streaming"])
    base = path.parent if path.is_file() else None
    shown = name if options["split"] is None else f"{name}[{options['split']}]"
    return dataset_images(data, image_column=options["image_column"], name=shown, base=base)


def _folder(path: Path, options: Mapping[str, Any]) -> ImageSource:
    from .dataset_images import dataset_images, load_dataset_of

    shown = str(path) if options["split"] is None else f"{path}[{options['split']}]"
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if not saved:
        files = list(_files_in(path))
        images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
        if images:
            return FileImages(images)
        tars = [file for file in files if file.lower().endswith(TAR_SUFFIXES)]
        if tars:
            from .tar_images import tar_images

            return _joined([tar_images(tar) for tar in tars])
        if not any(file.lower().endswith(TABLE_SUFFIXES) for file in files):
            raise ValueError(
                f"folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)}), no .tar, no .parquet and no "
                "saved dataset."
            )
    data = load_dataset_of(str(path), split=options["split"], streaming=options["streaming"])
    return dataset_images(data, image_column=options["image_column"], name=shown)


def _files_in(folder: Path) -> Iterator[str]:
    """Files of a folder and its subfolders, sorted; hidden ones left out."""

    def refuse(problem: OSError) -> None:
        raise problem  # a folder that cannot be listed would be left out without a word

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))


def _json_names(path: Path, column: str | None, image_folder: str | Path | None) -> list[str]:
    """Where the images of a JSON list or of JSON lines are; records without one are text alone."""
    from .llava_format import image_names, where_is
    from .loaders import read_records

    folders = [Path(image_folder)] if image_folder is not None else [path.parent, path.parent / "images"]
    found: list[str] = []
    for index, record in enumerate(read_records(path)):
        where = where_is(record, index, path)
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a {type(record).__name__}, not a record with names")
        if column is not None and column not in record:
            raise ValueError(f"{where} has no {column!r}: it has {', '.join(sorted(record))}")
        picked = record if column is None else {"image": record[column]}
        for name in image_names(picked, where):
            if _URL.match(name):
                found.append(name)
                continue
            there = (folder / name for folder in folders)
            found.append(str(next((p for p in there if p.is_file()), folders[0] / name)))
    if not found:
        raise ValueError(f"{path} names no image: give --image-column, where it is not image or images")
    return found


def file_stamp(path: str) -> str | None:
    """Size in bytes and time of change in nanoseconds of a local file; ``None`` where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return f"{found.st_size}-{found.st_mtime_ns}"
