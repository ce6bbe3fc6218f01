"""The images of a `datasets` set: rows of a table, left as stored until they are opened.

A column may hold Arrow images (bytes, or the path of a file), the bytes of image files, paths or URLs as
text, or lists of any of these. How many images a row holds is read off the column's offsets and null marks,
so that passing over a million finished rows reads none of their bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .image_items import URL, ImageItem, ImageSource, file_stamp

NAMED = ("image", "images", "jpg", "png", "jpeg", "webp")
"""Columns taken for images where nothing else says so."""


def load_dataset_of(name: str, split: str | None, streaming: bool) -> Any:
    """A dataset by path or hub id, its columns as they are.

    Raises:
        ValueError: it does not exist, or has no such split.
    """
    from ...data.loaders import load_plain

    path = Path(name).expanduser()
    if not streaming:
        return load_plain(path, name, split)
    from datasets import load_dataset

    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return load_plain(path, name, split).to_iterable_dataset()  # it is on disk already, and memory-mapped
    kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix.lower()) if path.is_file() else None
    try:
        if kind is not None:
            return load_dataset(kind, data_files=str(path), split=split or "train", streaming=True)
        return load_dataset(name, split=split or "train", streaming=True)
    except (FileNotFoundError, ConnectionError, OSError) as problem:
        raise ValueError(f"{name} is neither a local dataset nor one the hub gives: {problem}") from problem


def dataset_images(
    data: Any, *, image_column: str | None = None, name: str = "dataset", base: Path | None = None
) -> ImageSource:
    """The images of ``data``, a ``Dataset``, ``IterableDataset`` or ``DatasetDict`` of one split.

    Args:
        image_column: ``None`` takes the one column that holds images.
        name: what the names of its images begin with.
        base: where paths in a text column start; ``None``: where the process runs.

    Raises:
        ValueError: there is no such column, or none that is known to hold images, or several.
        TypeError: ``data`` is not a dataset.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(data, dict):
        if len(data) != 1:
            raise ValueError(f"{name} has the splits {', '.join(data)}: give one of them (--split).")
        ((part, data),) = data.items()
        name = f"{name}[{part}]"
    if not isinstance(data, (Dataset, IterableDataset)):
        raise TypeError(f"images cannot be read from a {type(data).__name__}; give a path or a dataset.")
    if isinstance(data, IterableDataset) and data.features is None:
        data = data._resolve_features()
    column = _choose(data, image_column, name)
    data = _undecoded(data.select_columns([column]), column)
    return TableImages(data, column, name, base) if isinstance(data, Dataset) else (
        StreamImages(data, column, name, base)
    )  # fmt: skip


class TableImages(ImageSource):
    """A map-style dataset: any image by its number."""

    def __init__(self, data: Any, column: str, name: str, base: Path | None) -> None:
        import numpy as np

        self.data, self.column, self.name, self.base = data, column, name, base
        self.lists, counts, self.inline = _stored(data, column)
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> ImageItem:
        import numpy as np

        if not 0 <= index < len(self):
            raise IndexError(f"image {index} is outside the {len(self)} of {self.name}.")
        row = int(np.searchsorted(self.ends, index, side="right"))
        place = index - (int(self.ends[row - 1]) if row else 0)
        name = f"{self.name}/{row}/{place}" if self.lists else f"{self.name}/{row}"
        if self.inline:
            return ImageItem(name, lambda: self._value(row, place), self.data._fingerprint)
        value = self._value(row, place)
        return ImageItem(name, lambda: value, _stamp(value, self.data._fingerprint))

    def _value(self, row: int, place: int) -> Any:
        value = self.data[row][self.column]
        images = [v for v in value if v is not None] if self.lists else [value]
        return _located(images[place], self.base)


class StreamImages(ImageSource):
    """A streaming dataset, in order."""

    random_access = False

    def __init__(self, data: Any, column: str, name: str, base: Path | None) -> None:
        self.data, self.column, self.name, self.base = data, column, name, base

    def __iter__(self) -> Iterator[ImageItem]:
        for row, record in enumerate(self.data):
            value = record[self.column]
            values = value if isinstance(value, (list, tuple)) else [value]
            for place, one in enumerate([v for v in values if v is not None]):
                name = f"{self.name}/{row}/{place}" if isinstance(value, (list, tuple)) else (
                    f"{self.name}/{row}"
                )  # fmt: skip
                found = _located(one, self.base)
                yield ImageItem(name, lambda found=found: found)  # type: ignore[misc]


def _choose(data: Any, asked: str | None, name: str) -> str:
    """The column of images."""
    from datasets import Image, LargeList, List

    columns = list(data.features)
    if asked is not None:
        if asked not in columns:
            from ...config import nearest

            raise ValueError(
                f"{name} has no column {asked!r}{nearest(asked, columns)}: it has {', '.join(columns)}."
            )
        return asked
    found = []
    for column, feature in data.features.items():
        inner = feature.feature if isinstance(feature, (List, LargeList)) else feature
        if isinstance(inner, Image):
            found.append(column)
    found = found or [column for column in NAMED if column in columns]
    if len(found) == 1:
        return found[0]
    what = f"several columns of images ({', '.join(found)})" if found else "no column known to hold images"
    raise ValueError(f"{name} has {what} among {', '.join(columns)}: name it (--image-column).")


def _undecoded(data: Any, column: str) -> Any:
    """Only how the column is read changes: the bytes as stored, not a decoded picture."""
    from ...data.lazy_images import undecoded

    return undecoded(data, (column,))


def _stored(data: Any, column: str) -> tuple[bool, Any, bool]:
    """Off the Arrow column: whether rows hold lists, how many images each row holds, and whether all of them
    are bytes inside the table."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    stored = data.data.column(column)
    lists = pa.types.is_list(stored.type) or pa.types.is_large_list(stored.type)
    values = pc.list_flatten(stored) if lists else stored
    valid = pc.is_valid(values).to_numpy(zero_copy_only=False)
    if lists:
        lengths = pc.fill_null(pc.list_value_length(stored), 0).to_numpy().astype(np.int64)
        before = np.concatenate([[0], np.cumsum(valid)])
        ends = np.cumsum(lengths)
        counts = before[ends] - before[ends - lengths]  # nulls inside a list are not images
    else:
        counts = valid.astype(np.int64)
    if data._indices is not None:  # shuffled or selected: rows in another order
        counts = counts[data._indices.column(0).to_numpy()]
    kind = values.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        inside = pc.is_valid(pc.struct_field(values, "bytes")).to_numpy(zero_copy_only=False)
        return lists, counts, bool((inside | ~valid).all())
    return lists, counts, pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _located(value: Any, base: Path | None) -> Any:
    """A path in a text column, from where it starts; other values as they are."""
    if not isinstance(value, str) or base is None or value.startswith("data:") or URL.match(value):
        return value
    return str(base / value)


def _stamp(value: Any, fingerprint: str) -> str | None:
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return fingerprint
        value = value.get("path")
    return file_stamp(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else None
