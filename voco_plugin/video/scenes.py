"""Scene changes: how far two pictures differ, and the frames where that passes a threshold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from .lazy_frames import LazyFrame

_SIDE = 32


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two RGB images over pixels and channels, from 0 (same) to 1 (black against
    white), after both are averaged down to 32 x 32.

    At that size noise, compression and small motion count little; a cut is mostly above 0.1.
    """
    import numpy as np

    x, y = (np.asarray(_small(image), dtype=np.int16) for image in (a, b))
    return float(np.abs(x - y).mean()) / 255


def scene_changes(frames: Iterable[LazyFrame], threshold: float) -> Iterator[LazyFrame]:
    """The first frame, and each that differs from the last one given by more than ``threshold``.

    A frame is compared with the last one given, not with the one before it: a fade and a slow pan then change
    the scene as a cut does, at any frame rate.
    """
    last: Any = None
    for frame in frames:
        image = frame.picture()
        if last is None or difference(last, image) > threshold:
            last = _small(image)
            yield replace(frame, picture=partial(_same, image))


def _same(image: Image.Image) -> Image.Image:
    return image


def _small(image: Image.Image) -> Image.Image:
    return image if image.size == (_SIDE, _SIDE) else image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
