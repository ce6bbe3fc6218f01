"""Datasets as TRL's vision path wants them: chat messages (or prompt and completion) next to images."""

from __future__ import annotations

from typing import Any

from ..data.conversations import llava_to_messages
from ..data.lazy_images import name_rows, undecoded

_IMAGES = {"image", "images"}


def has_images(dataset: Any) -> bool:
    """Whether the rows of ``dataset`` have an image column, filled or not."""
    return dataset is not None and bool(_IMAGES & set(next(iter(dataset), ())))


def prepare_dataset(dataset: Any, *, need_images: bool, name: str = "train_dataset") -> Any:
    """``dataset`` with LLaVA's ``conversations`` turned into ``messages``.

    Images stay as they are stored (bytes or a path) until the collator opens them, which knows the sample by
    name; a ``datasets.Dataset`` without ids gets its row numbers in a column ``row``, for the same reason.

    Args:
        dataset: a ``datasets`` dataset (map-style or iterable), a dict of them, or ``None``.
        need_images: whether a dataset without an image column is an error.

    Raises:
        ValueError: the dataset is empty, has videos only (TRL would train on its text alone), or has no
            images.
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return type(dataset)(
            {
                key: prepare_dataset(part, need_images=need_images, name=f"{name}[{key!r}]")
                for key, part in dataset.items()
            }
        )
    dataset = name_rows(undecoded(dataset))
    sample = next(iter(dataset), None)
    if sample is None:
        raise ValueError(f"{name} is empty; give at least one row.")
    columns = ", ".join(map(str, sample))
    if not _IMAGES & set(sample):
        if {"video", "videos"} & set(sample):
            raise ValueError(
                f"{name} has the columns {columns}: videos are not read here, and training would see the "
                "text alone; give the frames in a column 'images'."
            )
        if need_images and "input_ids" not in sample:
            raise ValueError(
                f"{name} has the columns {columns}: there is nothing to compress without 'image' or "
                "'images'; add the column ([] in rows without an image), or train with voco=None."
            )
    if "conversations" in sample and "messages" not in sample:

        def convert(conversations: Any, index: int = 0) -> dict[str, Any]:
            where = f"{name}, row {index}"
            messages = llava_to_messages({"conversations": conversations}, where)
            return {"messages": messages if _IMAGES & set(sample) else _as_text(messages, where)}

        dataset = dataset.map(
            convert, with_indices=True, input_columns=["conversations"], remove_columns=["conversations"]
        )
    return dataset


def _as_text(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """``messages`` without images, each one's content a string: templates of text models know no parts."""
    for message in messages:
        if any(part["type"] == "image" for part in message["content"]):
            raise ValueError(f"{where} has an <image> and the dataset no column 'image' or 'images'; add it.")
        message["content"] = "".join(part["text"] for part in message["content"])
    return messages
