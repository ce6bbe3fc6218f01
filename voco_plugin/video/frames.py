"""Frames with their times, and segments of them: a video as the rest of the package sees it.

One segment becomes one block (paper, Sec. 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        image: 8-bit RGB, the right way up.
        time: seconds from the first frame of the source.
        index: its number in the source, from 0, counting the frames that were not picked too.
    """

    image: Image.Image
    time: float
    index: int


@dataclass(frozen=True)
class Segment:
    """Neighbouring frames that become one block."""

    frames: tuple[Frame, ...]

    @property
    def time(self) -> float:
        """Seconds of its first frame."""
        return self.frames[0].time

    @property
    def end(self) -> float:
        """Seconds of its last frame."""
        return self.frames[-1].time


def segments(frames: Iterable[Frame], frames_per_block: int = 1) -> Iterator[Segment]:
    """``frames`` in groups of ``frames_per_block``, in order; the last may be shorter. Reads no further than
    the group that is asked for.

    Raises:
        ValueError: ``frames_per_block`` is below 1.
    """
    if frames_per_block < 1:
        raise ValueError(f"frames_per_block={frames_per_block} makes no block; give 1 or more.")
    return _grouped(frames, frames_per_block)


def _grouped(frames: Iterable[Frame], size: int) -> Iterator[Segment]:
    group: list[Frame] = []
    for frame in frames:
        group.append(frame)
        if len(group) == size:
            yield Segment(tuple(group))
            group = []
    if group:
        yield Segment(tuple(group))
