"""Frames and segments: what a video is made of, wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Frame:
    """A picture of a video.

    Attributes:
        image: PIL, RGB.
        time: seconds from the start.
        index: its number in the source.
    """

    image: Any
    time: float
    index: int


@dataclass(frozen=True)
class Segment:
    """Neighbouring frames that become one block."""

    frames: tuple[Frame, ...]

    @property
    def time(self) -> float:
        """Seconds: its first frame's time."""
        return self.frames[0].time

    @property
    def end(self) -> float:
        """Seconds: its last frame's time."""
        return self.frames[-1].time


def segments(frames: Iterable[Frame], frames_per_block: int = 1) -> Iterator[Segment]:
    """Frames in groups of ``frames_per_block``; the last may be shorter."""
    group: list[Frame] = []
    for frame in frames:
        group.append(frame)
        if len(group) == frames_per_block:
            yield Segment(tuple(group))
            group = []
    if group:
        yield Segment(tuple(group))
