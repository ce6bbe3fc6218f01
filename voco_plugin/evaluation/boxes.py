"""Boxes in words, the Shikra way (paper, Sec. 4.3, Tables 5 and 6): coordinates are text like any other.

    [06,12,31,38]    x0, y0, x1, y1: left, top, right, bottom edge, each as a share of the image's side, 0…99

An edge lies between pixels: a box that covers the whole image is [00,00,99,99].
"""

from __future__ import annotations

import re

Box = tuple[float, float, float, float]

SCALE = 99
"""What the far edge of an image is called."""

IOU_THRESHOLD = 0.5
"""Overlap from which a located object counts as found, as for RefCOCO."""

_TEXT = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")


def box_text(box: Box, width: float, height: float) -> str:
    """The text of a box in pixels (x0, y0, x1, y1; x1 and y1 just outside) of a `width x height` image.

    Raises:
        ValueError: the box is empty, or not inside the image.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"box {box} is empty or not inside an image of {width} x {height} pixels.")
    shares = (x0 / width, y0 / height, x1 / width, y1 / height)
    return "[" + ",".join(f"{int(SCALE * share + 0.5):02d}" for share in shares) + "]"


def parse_box(text: str) -> Box | None:
    """The first box in `text`, in its own units; None where there is none."""
    found = _TEXT.search(text)
    if found is None:
        return None
    x0, y0, x1, y1 = (float(number) for number in found.groups())
    return x0, y0, x1, y1


def iou(first: Box, second: Box) -> float:
    """Intersection over union, 0…1; a box whose edges are crossed or equal has no area and meets nothing."""
    if not (_area(first) and _area(second)):
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (_area(first) + _area(second) - shared)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def located(given: str, truth: str) -> bool:
    """Whether the box in the answer `given` overlaps the true one by at least `IOU_THRESHOLD`.

    Raises:
        ValueError: `truth` holds no box.
    """
    true = parse_box(truth)
    if true is None:
        raise ValueError(f"{truth!r} is no box: a question of type rec is answered by [x0,y0,x1,y1].")
    said = parse_box(given)
    return said is not None and iou(said, true) >= IOU_THRESHOLD
