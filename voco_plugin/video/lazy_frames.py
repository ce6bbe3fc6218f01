"""A frame that is not a picture yet: most frames of a video are passed over, and converting them to RGB would
cost more than decoding them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .frames import Frame


@dataclass(frozen=True)
class Shot:
    """What is known of a frame before its pixels are asked for.

    Attributes:
        time: seconds from the first frame, exact.
        index: its number in the source.
        length: seconds it stays on screen where nothing follows it; 0 where nothing tells.
        picture: gives the image, 8-bit RGB; may be called in another thread.
        slack: seconds by which ``time`` may be rounded (Matroska counts
            milliseconds, so that the frame of 1/24 s is at 42 ms).
    """

    time: Fraction
    index: int
    length: Fraction
    picture: Callable[[], Any]
    slack: Fraction = Fraction(0)

    def frame(self) -> Frame:
        """The picture itself, with its time."""
        return Frame(self.picture(), float(self.time), self.index)
