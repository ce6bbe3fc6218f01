"""Datasets whose images stay as stored until code that can name the sample opens them.

``datasets`` decodes an image when its row is read: a broken one then raises inside a worker, without a name,
and no other sample can replace it.
"""

from __future__ import annotations

import copy
from typing import Any

COLUMNS = ("image", "images")


def undecoded(dataset: Any, columns: tuple[str, ...] = COLUMNS) -> Any:
    """``dataset`` with the image columns among ``columns`` as records of ``bytes`` and ``path``; any other
    object as it is.

    A column whose feature asks for a mode (``Image(mode="L")``) is left to ``datasets``. No data is copied.
    A dataset with a transform of its own (``set_transform``) is left as it is: the transform asks for decoded
    images, and says what a row is. Any other format (numpy, torch, pandas, …) is taken off, since rows of
    conversations and stored images are what is read here.
    """
    from datasets import Dataset, IterableDataset
    from datasets.fingerprint import Hasher

    if not isinstance(dataset, (Dataset, IterableDataset)) or dataset.features is None:
        return dataset
    if has_transform(dataset):
        return dataset
    if isinstance(dataset, Dataset) and dataset.format["type"] is not None:
        if any(_is_array(dataset.features[c]) for c in columns if c in dataset.features):
            return dataset  # pixels as numbers: the format is what makes arrays of them
        dataset = dataset.with_format(None, columns=dataset.format["columns"])
    found = {c: _plain(dataset.features[c]) for c in columns if c in dataset.features}
    found = {column: feature for column, feature in found.items() if feature is not None}
    if not found:
        return dataset
    if isinstance(dataset, IterableDataset):
        for column, feature in found.items():
            dataset = dataset.cast_column(column, feature)
        return dataset
    # cast_column would write a copy of every image for a list of them: only how it is read differs
    made = copy.copy(dataset)
    made._info = made.info.copy()
    made._info.features = made._info.features.copy()
    made._info.features.update(found)
    made._fingerprint = Hasher.hash([dataset._fingerprint, "undecoded", sorted(found)])
    return made


def has_transform(dataset: Any) -> bool:
    """Whether a function of the user's makes the rows of a map-style dataset when they are read: its columns
    are what the function gets, not what it gives.
    """
    from datasets import Dataset

    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _is_array(feature: Any) -> bool:
    """Whether a feature holds numbers, or lists of them."""
    from datasets import LargeList, List, Value
    from datasets.features.features import _ArrayXD

    if isinstance(feature, (List, LargeList)):
        return _is_array(feature.feature)
    numbers = isinstance(feature, Value) and feature.dtype not in ("string", "large_string", "binary", "null")
    return numbers or isinstance(feature, _ArrayXD)


def name_rows(dataset: Any) -> Any:
    """A map-style dataset without ids gets its row numbers in a column ``row``, for messages to name.

    Left as it is where that would copy the data (a dataset that was shuffled or selected from).
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset) or {"id", "row"} & set(dataset.column_names):
        return dataset
    if dataset._indices is not None or dataset.format["type"] is not None:
        return dataset
    return dataset.add_column("row", list(range(len(dataset))))


def _plain(feature: Any) -> Any:
    """The feature that reads the same storage undecoded; ``None`` where there is nothing to change."""
    from datasets import Image, LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False) if feature.decode and feature.mode is None else None
    if isinstance(feature, (List, LargeList)):
        inner = _plain(feature.feature)
        if inner is None:
            return None
        made = copy.copy(feature)
        made.feature = inner
        return made
    return None
