"""``load_vision_dataset``: LLaVA JSON, a saved folder, local files, easy-VQA or a hub id, in TRL's vision
format.

The result is a `datasets.Dataset` whose rows have

    messages  [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": …}]}, …]
    images    in the order of their {"type": "image"} parts, decoded when the row is read

and the columns `id` and `types` where the source has them. Arrow gives every part the same fields, so a part
read back is `{"type": "image", "text": None}`: test `part["type"]`, not the presence of a key. Rows without
an image have `images == []`.

`<image>` in a LLaVA text is cut out together with one line break on either side of it: the chat template, not
the data, says how an image is set off from the text.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voco_plugin.data.easy_vqa import easy_vqa_folder, read_easy_vqa
from voco_plugin.data.llava_format import (
    check_count,
    llava_to_dataset,
    split_placeholders,
    to_messages,
    vision_features,
    where_is,
)

if TYPE_CHECKING:
    from datasets import Dataset


def load_vision_dataset(
    path_or_name: str | Path,
    split: str | None = None,
    image_folder: str | Path | None = None,
    *,
    missing_images: bool = False,
) -> Dataset:
    """Loads a set in LLaVA's or TRL's vision format.

    Args:
        path_or_name: a LLaVA `.json`/`.jsonl` file, a folder made by `save_to_disk`, a folder of parquet or
            other files that `datasets.load_dataset` reads, easy-VQA's folder or `package:easy_vqa`
            (`easy_vqa.py`), or a hub id.
        split: which split; None takes the only one, or `train`. A LLaVA file has no splits.
        image_folder: where a LLaVA file's image names start; default: beside the file, or its `images/`.
        missing_images: whether a LLaVA file may name images that do not exist; they are found missing when
            they are opened.

    Raises:
        ValueError: the source does not exist, has no such split or is in neither format; a record is
            malformed or its image is missing (the message names the record).
        FileNotFoundError: a `package:NAME` is not installed.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file() and path.suffix.lower() in (".json", ".jsonl"):
        records = read_records(path)
        if not _is_trl(records):
            if split is not None:
                warnings.warn(f"split={split!r} is ignored: {path} is one file without splits", stacklevel=2)
            return llava_to_dataset(records, path, image_folder, missing_images=missing_images)
    if image_folder is not None:
        warnings.warn("image_folder is ignored: it applies to LLaVA files only", stacklevel=2)
    published = easy_vqa_folder(path_or_name)
    if published is not None:
        records, images = read_easy_vqa(published, split, missing_images=missing_images)
        return llava_to_dataset(records, published, images, missing_images=missing_images)
    return _normalise(load_plain(path, str(path_or_name), split), str(path_or_name))


def read_records(path: Path) -> list[Any]:
    """The records of a JSON list or of JSON lines."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not valid JSON: {error} (one object per line? name it .jsonl)"
            ) from None
        if not isinstance(value, list):
            raise ValueError(f"{path} holds a {type(value).__name__}: LLaVA's format is a list of records")
        return value
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not valid JSON: {error}") from None
    return records


def _is_trl(records: list[Any]) -> bool:
    """Whether a JSON file is in TRL's format already, which `load_dataset` reads."""
    first = records[0] if records else None
    return (
        isinstance(first, dict)
        and "conversations" not in first
        and ("messages" in first or "prompt" in first)
    )


def load_plain(path: Path, name: str, split: str | None) -> Dataset:
    """A saved folder, a folder or file of tables, or a hub set, as it is: no column is touched."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            return _choose(loaded, split, name)
        if split is not None:
            warnings.warn(f"split={split!r} is ignored: {name} is one dataset without splits", stacklevel=3)
        return loaded
    if path.is_file():
        kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}.get(
            path.suffix.lower()
        )
        if kind is None:
            raise ValueError(
                f"{name}: cannot read {path.suffix!r} files: give .json, .jsonl, .parquet or a folder"
            )
        return load_dataset(kind, data_files=str(path), split=split or "train")
    if path.is_dir():
        found = sorted(file.name for file in path.glob("*.json*") if not file.name.startswith("dataset_"))
        if found and not list(path.rglob("*.parquet")):
            raise ValueError(
                f"{name} is a folder with {', '.join(found)}: name one of these files, or a saved dataset"
            )
    elif path.is_absolute() or name.startswith((".", "~")) or path.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(f"{name} does not exist: give a LLaVA JSON file, a dataset folder or a hub id")
    try:
        if split is not None:
            return load_dataset(name, split=split)
        return _choose(load_dataset(name), split, name)
    except (FileNotFoundError, ConnectionError, OSError) as error:
        raise ValueError(f"{name} is neither a local dataset nor one the hub gives: {error}") from error


def _choose(splits: Any, split: str | None, name: str) -> Dataset:
    if split is None and (len(splits) == 1 or "train" in splits):
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}: give one of {', '.join(splits)}")
    return splits[split]


def _normalise(dataset: Dataset, name: str) -> Dataset:
    """Brings a loaded dataset into the form of the module docstring; returns one already in it as it is."""
    from datasets import Image, List

    columns = set(dataset.column_names)
    if (
        "conversations" not in columns
        and "messages" not in columns
        and not {"prompt", "completion"} <= columns
    ):
        raise ValueError(
            f"{name} has the columns {', '.join(sorted(columns))}: "
            'TRL\'s vision format has "messages" (or "prompt" and "completion") and "images"'
        )
    source = "messages" if "messages" in columns else "conversations" if "conversations" in columns else None
    if source is None or (source == "messages" and not _has_text_content(dataset)):
        return dataset
    column = next((c for c in ("images", "image") if c in columns), None)
    if column is not None:  # counted and carried as stored, not decoded
        dataset = dataset.cast_column(
            column, List(Image(decode=False)) if column == "images" else Image(decode=False)
        )
    extra = [c for c in ("id", "types") if c in columns]
    features = vision_features()
    features.update({c: dataset.features[c] for c in extra})
    drop = [c for c in dataset.column_names if c not in features]
    return dataset.map(
        _normaliser(source, column, name), with_indices=True, features=features, remove_columns=drop
    )


def _has_text_content(dataset: Dataset) -> bool:
    """Whether the messages' content is plain text rather than typed parts."""
    from datasets import Value

    messages = dataset.features["messages"]
    item = getattr(messages, "feature", messages[0] if isinstance(messages, list) else None)
    return isinstance(item, dict) and isinstance(item.get("content"), Value)


def _normaliser(
    source: str, column: str | None, name: str
) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = where_is(row, index, name)
        images = row[column] if column else []
        images = [] if images is None else images if isinstance(images, list) else [images]
        if source == "conversations":
            messages = to_messages(row, where)
        else:
            messages = [
                {"role": m["role"], "content": split_placeholders(m["content"] or "")} for m in row[source]
            ]
        marked = any(part["type"] == "image" for message in messages for part in message["content"])
        if (
            images and not marked and source == "messages"
        ):  # TRL's convention: images before the first user text
            first = next((message for message in messages if message["role"] == "user"), messages[0])
            first["content"] = [{"type": "image", "text": None} for _ in images] + first["content"]
        check_count(messages, len(images), where)
        return {"messages": messages, "images": images}

    return convert
