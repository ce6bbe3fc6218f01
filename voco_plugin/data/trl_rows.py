"""A dataset's row in any known format → a copy in TRL's vision format, its images opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from trl.data_utils import prepare_multimodal_messages

from .conversations import llava_to_messages
from .images import open_image


def as_trl_row(
    example: Mapping[str, Any],
    text_field: str = "text",
    where: str = "the sample",
    opener: Callable[[Any, str], Any] = open_image,
) -> dict[str, Any]:
    """A copy of ``example`` in TRL's vision format; ``images`` holds its images in reading order, loaded by
    ``opener``.
    """
    row = {key: value for key, value in example.items() if key not in ("image", "images", "conversations")}
    if "conversations" in example and "messages" not in example:
        row["messages"] = llava_to_messages(example, where)
    if not any(key in row for key in ("messages", text_field)) and not {"prompt", "completion"} <= set(row):
        raise ValueError(
            f"{where} has the keys {', '.join(map(str, example))}; give 'messages', 'prompt' and "
            f"'completion', {text_field!r} or 'conversations', with 'image' or 'images'."
        )
    given = [
        _open(image, where, opener) for key in ("image", "images") for image in _as_list(example.get(key))
    ]
    if example.get("videos") and not given:
        raise ValueError(
            f"{where} has videos and no images, and videos are not read here; give frames as images."
        )
    images: list[Any] = []
    row["images"] = images
    for key in ("messages", "prompt", "completion"):
        if isinstance(row.get(key), list):
            row[key] = [_lift_images(message, given, images, where, opener) for message in row[key]]
    images += given  # of plain text, and of messages whose content is a string
    spoken = row.get("messages", row.get("prompt"))
    if isinstance(spoken, list):
        try:
            prepare_multimodal_messages(spoken, images=images)
        except ValueError as error:
            raise ValueError(
                f"{where}: {error} Write one placeholder per image, where the image stands."
            ) from None
    return row


def _lift_images(
    message: dict[str, Any],
    given: list[Any],
    images: list[Any],
    where: str,
    opener: Callable[[Any, str], Any],
) -> dict[str, Any]:
    """A copy of ``message``; the image of each image part (its own, or the next given) goes to ``images``."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = []
    for part in content:
        part = {
            key: value for key, value in part.items() if value is not None
        }  # Arrow fills absent keys with None
        if part.get("type") == "image":
            own = [part.pop(key) for key in ("image", "url", "path", "base64") if key in part]
            if own:
                images.append(_open(own[0], where, opener))
            elif given:
                images.append(given.pop(0))
        parts.append(part)
    return {**message, "content": parts}


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _open(image: Any, where: str, opener: Callable[[Any, str], Any]) -> Any:
    """An RGB image of whatever :func:`~voco_plugin.data.images.open_image` reads; arrays as they are."""
    if isinstance(image, (str, bytes, os.PathLike, Mapping, Image.Image)):
        return opener(image, where)
    return image


def _kind(row: Mapping[str, Any], text_field: str) -> str:
    return next((key for key in ("messages", text_field) if key in row), "prompt")


def check_same_kind(rows: list[dict[str, Any]], text_field: str, names: list[str]) -> None:
    """One format a batch: TRL's collator goes by its first row."""
    kinds = [_kind(row, text_field) for row in rows]
    for kind, name in zip(kinds, names, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"{name} has {kind!r} where {names[0]} has {kinds[0]!r}; give all rows one format."
            )


def name_of(example: Mapping[str, Any], number: int) -> str:
    for key in ("id", "row"):
        if example.get(key) is not None:
            return f"sample {number} ({key} {example[key]!r})"
    return f"sample {number}"
