"""``LazyFrame``: a frame whose picture is made when it is asked for. Most frames of a video are passed over,
and converting them to RGB would cost more than decoding them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .frames import Frame


@dataclass(frozen=True)
class LazyFrame:
    """A frame before its pixels are asked for.

    Attributes:
        time: seconds from the first frame, exact.
        index: its number in the source.
        length: seconds it stays on screen where no other follows; 0 where the file does not say.
        picture: gives the image, 8-bit RGB; may be called in another thread.
        slack: seconds by which ``time`` may be rounded (Matroska counts milliseconds, so that the frame of
            1/24 s is at 42 ms).
    """

    time: Fraction
    index: int
    length: Fraction
    picture: Callable[[], Any]
    slack: Fraction = Fraction(0)

    def load(self) -> Frame:
        """The frame with its picture."""
        return Frame(self.picture(), float(self.time), self.index)
