"""Which frames of a video a model is shown, and in which order: what tells reading time from reading a frame.

    all        every frame, in order
    single     the middle frame alone, with its time text
    shuffled   every frame, in an order drawn from a seed; time texts stay in their places, so the text is
               that of `all` and only what it stands before differs

A model whose accuracy on `all` is that on `shuffled` does not read order; one whose accuracy is that on
`single` reads one frame.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.conversations import image_times

FRAMES = {
    "all": "every frame, in order",
    "single": "the middle frame alone",
    "shuffled": "every frame, in an order drawn from a seed; time texts stay in place",
}


def check_frames(frames: str) -> str:
    """``frames``, or a ``ValueError`` where it is not a key of :data:`FRAMES`."""
    if frames not in FRAMES:
        raise ValueError(f"frames={frames!r} is not known; use {', '.join(FRAMES)}.")
    return frames


def frame_order(count: int, frames: str = "all", seed: int = 0, row: int = 0) -> list[int]:
    """Indices of the frames to show, of ``count``.

    Args:
        row: the number of the video: each is shuffled in its own way.

    Raises:
        ValueError: ``frames`` is not known.
    """
    check_frames(frames)
    if frames == "single":
        return [count // 2] if count else []
    order = list(range(count))
    if frames == "shuffled":
        random.Random(f"{seed}/{row}").shuffle(order)
    return order


def row_times(row: Mapping[str, Any], count: int) -> list[str | None]:
    """Per frame of a row with ``count`` of them its time text (column ``times``, or as its messages have it),
    or ``None``."""
    times = row.get("times")
    times = list(times) if times is not None else image_times(row.get("messages") or ())
    return times if len(times) == count else [None] * count


def shown_times(times: Sequence[str | None], frames: str) -> list[str | None]:
    """The time texts that go with :func:`frame_order`: in their places, or that of the middle frame."""
    return [times[i] for i in frame_order(len(times), "single" if frames == "single" else "all")]


def picture_key(source: Any) -> str:
    """Names a frame's picture, so that one shown twice is compressed once: by the bytes of its file or its
    pixels, else by its path."""
    from PIL import Image

    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path") or id(source)
    if isinstance(source, Image.Image):
        head = f"{source.mode} {source.size} "
        return head + hashlib.sha256(source.tobytes()).hexdigest()
    if isinstance(source, (bytes, bytearray)):
        return hashlib.sha256(source).hexdigest()
    return str(source)
