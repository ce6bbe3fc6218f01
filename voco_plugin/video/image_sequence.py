"""Image sequences as videos: lists of images, folders of frames, animated images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import IMAGE_SUFFIXES, BadImageError, describe, image_size, open_image, to_rgb
from .errors import BadVideoError
from .lazy_frames import LazyFrame

_NUMBERS = re.compile(r"(\d+)")
_NO_DELAY = Fraction(1, 10)
"""How long browsers show a frame of an animated image that names no duration (or 0), in seconds."""
_UNCOUNTED = 1 << 30
"""Frames to try where a broken file does not tell how many it has: reading stops where it breaks."""
_CHECK = "Check the file, or convert the animation again."


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sorts ``frame2`` before ``frame10``: digits count as numbers, letters regardless of case."""
    parts = _NUMBERS.split(name)
    return [(0, int(p)) if i % 2 else (1, p.lower()) for i, p in enumerate(parts) if p], name


def frame_files(folder: Path) -> list[str]:
    """The images of a frame folder (not of its subfolders, hidden ones left out), in natural order.

    Raises:
        BadVideoError: there is none.
    """
    names = [e.name for e in os.scandir(folder) if e.is_file() and not e.name.startswith(".")]
    found = sorted((n for n in names if n.lower().endswith(IMAGE_SUFFIXES)), key=natural_key)
    if not found:
        raise BadVideoError(
            str(folder),
            f"the folder holds no image ({', '.join(IMAGE_SUFFIXES)})",
            "Give a folder of frames.",
        )
    return [str(folder / name) for name in found]


def sequence(images: Sequence[Any], rate: Fraction, name: str) -> Iterator[LazyFrame]:
    """Images (whatever :func:`~voco_plugin.data.images.open_image` opens) as frames, ``rate`` a second.

    Raises:
        BadVideoError: when it comes to an image that cannot be read.
    """

    def opened(number: int) -> Image.Image:
        try:
            return open_image(images[number])
        except BadImageError as problem:
            before = float((number - 1) / rate) if number else None
            raise BadVideoError(
                name, f"frame {number}: {problem}", "Replace the image or take it out.", before
            ) from None

    for number in range(len(images)):
        yield LazyFrame(number / rate, number, 1 / rate, partial(opened, number))


def is_animated(path: Path) -> bool:
    """Whether Pillow, not FFmpeg, reads it: by its suffix, as an image of any other kind has one frame."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def animation(path: Path, rate: Fraction) -> Iterator[LazyFrame]:
    """The frames of a GIF, APNG or WebP, each as long on screen as the file says; one after the other, so
    that one decoded frame is held. An image that is not animated is one frame.

    Args:
        rate: pages a second of a TIFF, which has no clock.

    Raises:
        BadVideoError: it cannot be read, or not to its end.
    """
    name, number, time = str(path), 0, Fraction(0)
    try:
        image_size(path)  # missing, empty, too large, no image
        image = Image.open(path)
    except (BadImageError, OSError) as problem:
        raise BadVideoError(name, str(problem), _CHECK) from None
    with image:
        try:
            count = getattr(image, "n_frames", 1)  # reads through a GIF
        except Exception:
            count = _UNCOUNTED
        hidden = 1 if image.info.get("default_image") else 0  # an APNG's picture for those who cannot play it
        last = None
        for place in range(hidden, count):
            try:
                image.seek(place)
                picture = to_rgb(image).copy()  # Pillow draws the next frame over this one
            except MemoryError:
                raise
            except Exception as error:
                reason = f"{describe(path)}, frame {number}: {str(error) or type(error).__name__}"
                raise BadVideoError(name, reason, _CHECK, last) from None
            length = _seconds_shown(image, rate)
            yield LazyFrame(time, number, length, partial(_same, picture))
            last = float(time)
            number, time = number + 1, time + length


def _same(picture: Image.Image) -> Image.Image:
    return picture


def _seconds_shown(image: Image.Image, rate: Fraction) -> Fraction:
    """Seconds that the frame just read stays."""
    if image.format not in ("GIF", "PNG", "WEBP"):
        return 1 / rate
    milliseconds = Fraction(str(image.info.get("duration") or 0))
    return milliseconds / 1000 or _NO_DELAY


def animation_duration(path: Path, rate: Fraction) -> tuple[Fraction, int]:
    """``(seconds, frames)`` of an animated image, by playing it once."""
    seconds, count = Fraction(0), 0
    for frame in animation(path, rate):
        seconds, count = frame.time + frame.length, count + 1
    return seconds, count
