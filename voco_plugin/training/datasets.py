"""Datasets as TRL's vision path wants them: chat messages (or prompt and completion) next to images."""

from __future__ import annotations

from typing import Any

from ..data.conversations import llava_to_messages
from ..data.lazy_images import has_transform, name_rows, undecoded

_IMAGES = {"image", "images"}


def has_images(dataset: Any) -> bool:
    """Whether the rows of ``dataset`` have an image column, filled or not."""
    return dataset is not None and bool(_IMAGES & set(next(iter(dataset), ())))


def uses_chat_template(dataset: Any) -> bool:
    """Whether the rows of ``dataset`` are conversations, which a chat template writes."""
    from trl.data_utils import is_conversational

    row: Any = {} if dataset is None else next(iter(dataset), {})
    if not isinstance(row, dict):  # no rows: TRL says what is wrong
        return False
    return bool(_IMAGES & set(row)) or is_conversational(row)


def prepare_dataset(dataset: Any, *, need_images: bool, name: str = "train_dataset") -> Any:
    """``dataset`` with LLaVA's ``conversations`` turned into ``messages``, unless a transform of its own
    makes its rows (``set_transform``): those are turned one by one, as the collator gets them.

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
    own = has_transform(dataset) or not hasattr(dataset, "map")  # the collator turns such rows as they come
    if "conversations" in sample and "messages" not in sample and not own:

        def convert(conversations: Any, index: int = 0) -> dict[str, Any]:
            where = f"{name}, row {index}"
            messages = llava_to_messages({"conversations": conversations}, where)
            return {"messages": messages if _IMAGES & set(sample) else _as_text(messages, where)}

        dataset = dataset.map(
            convert, with_indices=True, input_columns=["conversations"], remove_columns=["conversations"]
        )
    return dataset


def check_dispatch(args: Any, *datasets: Any) -> None:
    """Refuse accelerate's dispatch of images: process 0 makes a batch and cuts every tensor by rows, and one
    row's pixels are many rows of a tensor, or few.

    Raises:
        ValueError: ``accelerator_config.dispatch_batches`` is true, and a dataset has images.
    """
    parts = [part for given in datasets for part in (given.values() if isinstance(given, dict) else [given])]
    if args.accelerator_config.dispatch_batches and any(map(has_images, parts)):
        raise ValueError(
            "accelerator_config.dispatch_batches=True cuts a batch by its rows, and images are not laid out "
            "so; leave it out, or set it to false."
        )


def groups_by_length(args: Any) -> bool:
    """Whether batches are to be of rows of like length."""
    return getattr(args, "train_sampling_strategy", None) == "group_by_length"


def check_lengths(args: Any, dataset: Any) -> None:
    """Refuse to group rows by a length that nothing tells: how many tokens an image takes is known where it
    is processed.

    Raises:
        ValueError: the column of lengths is missing, or the dataset is a stream, which is read in order.
    """
    if not groups_by_length(args) or not has_images(dataset):
        return
    name = "train_sampling_strategy='group_by_length'"
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{name}: a streamed data set is read in its order; leave it out.")
    columns = getattr(dataset, "column_names", None) or []
    if args.length_column_name not in columns or has_transform(dataset):
        raise ValueError(
            f"{name} needs a column {args.length_column_name!r} (length_column_name) with the tokens of each "
            f"row, its images' included, and the set has {', '.join(columns)}; add it, or set "
            "packing: true, which counts them itself."
        )


def _as_text(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """``messages`` without images, each one's content a string: templates of text models know no parts."""
    for message in messages:
        if any(part["type"] == "image" for part in message["content"]):
            raise ValueError(f"{where} has an <image> and the dataset no column 'image' or 'images'; add it.")
        message["content"] = "".join(part["text"] for part in message["content"])
    return messages
