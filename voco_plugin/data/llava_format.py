"""LLaVA's records, `{"id", "image", "conversations": [{"from", "value"}]}`, as rows of TRL's format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voco_plugin.data.conversations import PLACEHOLDER, llava_to_messages
from voco_plugin.data.conversations import split_placeholders as plain_parts
from voco_plugin.data.images import URL, inline_bytes, is_written_out

if TYPE_CHECKING:
    from datasets import Dataset, Features


def vision_features(with_id: bool = False, with_types: bool = False) -> Features:
    """The columns of TRL's vision format as Arrow features; images are decoded on access."""
    from datasets import Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    columns: dict[str, Any] = {"id": Value("string")} if with_id else {}
    columns["messages"] = List({"role": Value("string"), "content": List(part)})
    columns["images"] = List(Image())
    if with_types:
        columns["types"] = List(Value("string"))
    return Features(columns)


def split_placeholders(text: str) -> list[dict[str, str | None]]:
    """`text` cut at each `<image>` into typed parts, each with every key, as Arrow wants them."""
    return [{"text": None, **part} for part in plain_parts(text)]


def llava_to_dataset(
    records: list[dict[str, Any]],
    path: str | Path,
    image_folder: str | Path | None = None,
    *,
    missing_images: bool = False,
) -> Dataset:
    """Turns LLaVA records (`id`, `image`, `conversations`) into a dataset; see `load_vision_dataset`.

    Args:
        records: as read from the file.
        path: the file they came from, which image names are relative to.
        image_folder: overrides where image names start.
        missing_images: whether an image that does not exist is kept by name.
    """
    from datasets import Dataset

    folders = (
        [Path(image_folder)]
        if image_folder is not None
        else [Path(path).parent, Path(path).parent / "images"]
    )
    if not records:
        raise ValueError(f"{path} holds no records")
    with_id = any(isinstance(r, dict) and "id" in r for r in records)
    with_types = any(isinstance(r, dict) and "types" in r for r in records)
    features = vision_features(with_id, with_types)
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for index, record in enumerate(records):
        where = where_is(record, index, path)
        messages = to_messages(record, where)
        names = image_names(record, where)
        check_count(messages, len(names), where)
        columns["messages"].append(messages)
        columns["images"].append([_find_image(name, folders, where, missing_images) for name in names])
        if with_id:
            columns["id"].append(str(record.get("id", index)))
        if with_types:
            columns["types"].append([str(kind) for kind in record.get("types") or []])
    return Dataset.from_dict(columns, features=features)


def where_is(record: Any, index: int, source: object) -> str:
    """Names a record in an error: its source, its id if it has one, and its index."""
    name = record.get("id") if isinstance(record, dict) else None
    return (
        f"{source}: sample {name!r} (index {index})"
        if name is not None
        else f"{source}: sample at index {index}"
    )


def to_messages(record: Any, where: str) -> list[dict[str, Any]]:
    """One record as messages whose content is typed parts; Arrow wants every key in each part."""
    messages = llava_to_messages(record if isinstance(record, dict) else {}, where)
    for message in messages:
        message["content"] = [{"text": None, **part} for part in message["content"]]
    return messages


def image_names(record: dict[str, Any], where: str) -> list[str]:
    value = record.get("image", record.get("images"))
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'{where}: "image" is {value!r}: give a file name, or a list of them')
    return names


def check_count(messages: list[dict[str, Any]], num_images: int, where: str) -> None:
    """Raises a ValueError unless there are as many placeholders as images."""
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != num_images:
        raise ValueError(
            f"{where} has {num_images} image(s) and {placeholders} {PLACEHOLDER} placeholder(s): "
            "write one placeholder per image, where the image stands"
        )


def _find_image(name: str, folders: list[Path], where: str, missing: bool) -> str | dict[str, Any]:
    """Where an image is, or its bytes where the record holds it."""
    if is_written_out(name):
        try:
            return {"bytes": inline_bytes(name), "path": None}
        except ValueError as problem:
            raise ValueError(f"{where}: its image cannot be read: {problem}") from None
    if URL.match(name):
        return name
    for folder in folders:
        if os.path.isfile(folder / name):
            return str(folder / name)
    if missing:
        return str(folders[0] / name)
    looked = ", ".join(str(folder) for folder in folders)
    shown = name if len(name) <= 300 else f"{name[:40]}…"
    raise ValueError(
        f"{where}: image {shown!r} is not in {looked}: set image_folder to where the names start"
    )
