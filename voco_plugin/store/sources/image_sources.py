"""Where the images of a large job come from: named, found without decoding one, opened when their turn comes.

    source                                        name of an image                  random access
    image file, folder (with its subfolders)      its path                          yes
    http(s) or ``data:`` URL                      the URL (data:HASH)               yes
    LLaVA JSON or any JSON list / JSONL           the path its record leads to,     yes
                                                  JSON/ROW where it holds the image
    tar (WebDataset shards), uncompressed, local  TAR/MEMBER                        yes
    tar, compressed or remote                     TAR/MEMBER                        no: read in order
    saved `datasets` folder, Parquet, CSV, hub    SOURCE[split]/ROW, /ROW/J where   yes; not when streaming
    id, `Dataset`, `IterableDataset`              a row holds a list of images

`photos/*.jpg` and `train-{0000..0031}.tar` name many files or shards. Hidden files are left out of folders.
Nothing is unpacked to disk. An image that cannot be read raises ``BadImageError`` when it is opened, not
before.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...video.decoding import VIDEO_SUFFIXES
from .image_items import IMAGE_SUFFIXES, URL, FileImages, ImageSource, JoinedImages

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TABLE_SUFFIXES = (".parquet", ".csv")

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_MAX_NAMES = 10_000_000


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
        missing: whether the name of a file that does not exist is kept; it raises when it is opened.

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
            merged[-1].inline |= source.inline
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
    if len(pattern) < 4096 and os.path.lexists(os.path.expanduser(pattern)):
        return [pattern]
    names = [pattern] if pattern[:5].lower() == "data:" else _braces(pattern)
    found: list[str] = []
    for name in names:
        if URL.match(name) or name[:5].lower() == "data:" or not glob.has_magic(name):
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
    if lower.startswith("data:"):
        return _inline(name)
    if URL.match(name):
        return _remote(name)
    if lower.endswith(TAR_SUFFIXES):
        from .tar_images import tar_images

        return tar_images(name)
    if path.is_dir():
        return _folder(path, options)
    if lower.endswith((".json", ".jsonl")):
        if not path.is_file():
            raise FileNotFoundError(f"{name} does not exist.")
        return _json_images(path, options["image_column"], options["image_folder"])
    if lower.endswith(VIDEO_SUFFIXES):
        raise ValueError(f"{name} is a video: say which of its frames (voco compress --fps 1; video_source).")
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


def _remote(url: str) -> ImageSource:
    """A URL by the suffix of its path: what follows a ``?`` or ``#`` says nothing of the kind."""
    path = urllib.parse.urlsplit(url).path.lower()
    if path.endswith(TAR_SUFFIXES) or url.lower().endswith(TAR_SUFFIXES):
        from .tar_images import tar_images

        return tar_images(url)
    if path.endswith(VIDEO_SUFFIXES):
        raise ValueError(f"{url} is a video: say which of its frames (voco compress --fps 1; video_source).")
    if path.endswith((".json", ".jsonl", *TABLE_SUFFIXES)):
        raise ValueError(f"{url} is a URL; lists and tables are read from this disk: download it first.")
    if not url.lower().startswith(("http://", "https://")) and not path.endswith(IMAGE_SUFFIXES):
        raise FileNotFoundError(f"{url} is no URL of an image (http, https) or of a .tar.")
    return FileImages([url])  # opening it says whether it is an image


def _inline(url: str) -> ImageSource:
    name = f"data:{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return FileImages([name], {name: url})


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
    """Files of a folder and its subfolders, links to folders too, sorted; hidden ones left out. A folder that
    is reached twice is read once.
    """
    seen = {os.path.realpath(folder)}

    def refuse(problem: OSError) -> None:
        raise problem  # a folder that cannot be listed would be left out without a word

    def new(place: str) -> bool:
        real = os.path.realpath(place)
        return not (real in seen or seen.add(real))  # type: ignore[func-returns-value]

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in shown if new(os.path.join(place, name))]
        yield from (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))


def _json_images(path: Path, column: str | None, image_folder: str | Path | None) -> FileImages:
    """The images of a JSON list or of JSON lines; records without one are text alone. One that is written
    out there (a ``data:`` URL, base64) is called ``PATH/INDEX``, the second of a record ``PATH/INDEX/1``.
    """
    from ...data.images import is_written_out
    from ...data.llava_format import image_names, where_is
    from ...data.loaders import read_records

    folders = [Path(image_folder)] if image_folder is not None else [path.parent, path.parent / "images"]
    found: list[str] = []
    inline: dict[str, str] = {}
    for index, record in enumerate(read_records(path)):
        where = where_is(record, index, path)
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a {type(record).__name__}, not a record with names")
        if column is not None and column not in record:
            raise ValueError(f"{where} has no {column!r}: it has {', '.join(sorted(record))}")
        picked = record if column is None else {"image": record[column]}
        for place, name in enumerate(image_names(picked, where)):
            if is_written_out(name):
                called = f"{path}/{index}/{place}" if place else f"{path}/{index}"
                inline[called] = name
                found.append(called)
                continue
            if URL.match(name):
                found.append(name)
                continue
            there = (folder / name for folder in folders)
            found.append(str(next((p for p in there if os.path.isfile(p)), folders[0] / name)))
    if not found:
        raise ValueError(f"{path} names no image: give --image-column, where it is not image or images")
    return FileImages(found, inline)
