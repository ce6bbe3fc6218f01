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
    """
    from datasets import Dataset, IterableDataset
    from datasets.fingerprint import Hasher

    if not isinstance(dataset, (Dataset, IterableDataset)) or dataset.features is None:
        return dataset
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
