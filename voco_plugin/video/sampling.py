"""``Sampling``: which frames of a video are taken.

    fps     the frame on screen at start, start + 1/fps, start + 2/fps, …
    count   the frame on screen in the middle of each of `count` equal parts of the time from start to end
    scene   the first frame, and each frame that differs from the last one taken by more than the threshold
    none    every frame

On screen at t is the last frame whose time is at most t. A frame is taken once, however long it
is on screen. Frames keep their own times: with `fps` these are at or just before the grid's. `start` and
`end` are seconds; `end` itself is outside. `max_frames` ends the reading; to thin a video evenly, use
`count`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from .errors import BadVideoError
from .lazy_frames import LazyFrame
from .scenes import scene_changes


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken; see the module.

    Attributes:
        fps: frames a second.
        count: frames in all.
        scene: a difference from 0 to 1 (:func:`~voco_plugin.video.scenes.difference`).
        start, end: seconds.
        max_frames: at most so many.

    Raises:
        ValueError: a value is out of range, or more than one of ``fps``, ``count`` and ``scene`` is given.
    """

    fps: float | None = None
    count: int | None = None
    scene: float | None = None
    start: float | None = None
    end: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("fps", "count", "scene") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two ways to pick frames; give one of them.")
        for name in ("fps", "scene", "start", "end"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value} is no number to sample by.")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps={self.fps} takes no frame; give frames a second above 0.")
        for name in ("count", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} takes no frame; give 1 or more.")
        if self.scene is not None and not 0 < self.scene < 1:
            raise ValueError(f"scene={self.scene} is outside 0…1; 0.1 finds cuts.")
        if self.start is not None and self.start < 0:
            raise ValueError(f"start={self.start} is before the video; give seconds from 0 on.")
        if self.end is not None and self.end <= (self.start or 0):
            raise ValueError(f"end={self.end} is not after start={self.start or 0}.")

    @property
    def begin(self) -> Fraction:
        """``start`` in exact seconds."""
        return exact(self.start or 0)

    @property
    def stop(self) -> Fraction | None:
        """``end`` in exact seconds."""
        return None if self.end is None else exact(self.end)

    def times(self, duration: Fraction | None) -> Iterator[Fraction] | None:
        """The times whose frames are taken, in order; ``None`` where frames are not taken by time.

        Args:
            duration: seconds of the whole video; only ``count`` needs it.
        """
        if self.fps is not None:
            step = 1 / exact(self.fps)
            grid = (self.begin + step * k for k in itertools.count())
            stop = self.stop
            return grid if stop is None else itertools.takewhile(lambda t: t < stop, grid)
        if self.count is not None:
            assert duration is not None
            last = duration if self.stop is None else min(self.stop, duration)
            part = (last - self.begin) / self.count
            if part <= 0:
                return iter(())
            return (self.begin + part * (2 * k + 1) / 2 for k in range(self.count))
        return None

    def pick(self, frames: Iterable[LazyFrame], duration: Fraction | None = None) -> Iterator[LazyFrame]:
        """Those of ``frames`` that are taken; they come in the order of their times."""
        times = self.times(duration)
        taken = at_times(frames, times) if times is not None else within(frames, self.begin, self.stop)
        if self.scene is not None:
            taken = scene_changes(taken, self.scene)
        return itertools.islice(taken, self.max_frames)

    def expected(self, duration: float | None, frames: int | None = None) -> int | None:
        """About how many frames it takes, for a progress bar; ``None`` where nothing tells.

        Args:
            duration: seconds of the video.
            frames: how many it has.
        """
        if duration is not None:
            share = max(0.0, min(self.end or duration, duration) - (self.start or 0))
        if self.count is not None:
            found: float | None = self.count
        elif duration is None or self.scene is not None:
            found = None
        elif self.fps is not None:
            found = math.ceil(share * self.fps)
        else:
            found = None if not frames or not duration else math.ceil(frames * share / duration)
        if found is None or self.max_frames is None:
            return None if found is None else int(found)
        return min(int(found), self.max_frames)

    def __str__(self) -> str:
        named = ("fps", "count", "scene", "start", "end", "max_frames")
        given = [f"{n}={getattr(self, n):g}" for n in named if getattr(self, n) is not None]
        return " ".join(given) or "every frame"


def exact(value: float) -> Fraction:
    """A number as it was written: 29.97 is 2997/100, not the nearest binary fraction."""
    return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)


def at_times(frames: Iterable[LazyFrame], times: Iterator[Fraction]) -> Iterator[LazyFrame]:
    """The frame on screen at each of ``times`` (rising), each frame once. Reads one frame ahead."""
    wanted = next(times, None)
    shown: LazyFrame | None = None
    broken: BadVideoError | None = None
    if wanted is None:
        return
    try:
        for frame in frames:
            seen = False
            while wanted is not None and wanted + frame.slack < frame.time:
                seen, wanted = True, next(times, None)
            if seen and shown is not None:
                yield shown
            if wanted is None:
                return
            shown = frame
    except BadVideoError as problem:
        broken = problem  # the frame shown last is from before the damage
    # the last one is on screen until its own end; of unknown length, at its own time only
    if (
        shown is not None
        and wanted is not None
        and (wanted <= shown.time + shown.slack or wanted < shown.time + shown.length)
    ):
        yield shown
    if broken is not None:
        raise broken


def within(frames: Iterable[LazyFrame], begin: Fraction, stop: Fraction | None) -> Iterator[LazyFrame]:
    """The frames from ``begin`` on, before ``stop``."""
    for frame in frames:
        if stop is not None and frame.time + frame.slack >= stop:
            return
        if frame.time + frame.slack >= begin:
            yield frame
