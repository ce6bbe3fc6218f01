"""``read_video``: any source of frames → the frames that are wanted, as they are reached."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from .decoding import VideoFile
from .frames import Frame
from .lazy_frames import LazyFrame
from .packets import PacketTable, packet_table
from .sampling import Sampling, at_times, within
from .scenes import scene_changes
from .seeking import UnsoundError, frames_at
from .sources import VideoSource

logger = logging.getLogger(__name__)

_SPARSE = 0.5
"""Frames a second up to which jumping between key frames is worth reading all packets first."""
_LATE = 5.0
"""Seconds of ``start`` from which it is worth it."""


def read_video(
    source: Any,
    *,
    fps: float | None = None,
    count: int | None = None,
    scene: float | None = None,
    start: float | None = None,
    end: float | None = None,
    max_frames: int | None = None,
    rate: float | None = None,
    follow: float | None = None,
    options: Mapping[str, str] | None = None,
) -> Iterator[Frame]:
    """The frames of a video, one by one; at most two decoded ones are held, whatever its length.

    Args:
        source: a video file; a GIF, APNG or WebP; a folder of frames (natural order); a list of images (paths
            or PIL); a URL; the number of a camera.
        fps, count, scene, start, end, max_frames: which frames (:mod:`~voco_plugin.video.sampling`); none of
            the first three takes every frame.
        rate: frames a second of a folder or list, which have no clock (default: 1).
        follow: the file is still being written: wait for more, until it has not grown for so many seconds.
        options: FFmpeg's, for files and live sources.

    Raises:
        BadVideoError: at once where the source is missing or empty; where the reading gets to it: no video in
            it, damaged or cut off. Frames before the damage have been given.
        ImportError: PyAV is not installed.
        ValueError: options out of range or against each other, or ``count`` of a live source, whose end
            nobody knows.
    """
    sampling = Sampling(fps=fps, count=count, scene=scene, start=start, end=end, max_frames=max_frames)
    found = VideoSource.of(source, rate=rate, follow=follow, options=options)
    return (frame.load() for frame in read_lazy_frames(found, sampling))


def read_lazy_frames(source: VideoSource, sampling: Sampling) -> Iterator[LazyFrame]:
    """As :func:`read_video`; a frame's picture is made when it is asked for, which may be in another thread.

    Raises:
        ValueError: ``count`` of a live source.
    """
    if source.kind == "live":
        if sampling.count is not None:
            raise ValueError(
                f"count={sampling.count} needs to know where the video ends, and {source.name} is live: give "
                "fps."
            )
        return _live(source, sampling)
    return _file(source, sampling) if source.kind == "file" else _images(source, sampling)


def _images(source: VideoSource, sampling: Sampling) -> Iterator[LazyFrame]:
    duration = source.images_length()[0] if sampling.count is not None else None
    yield from sampling.pick(source.image_frames(), duration)


def _live(source: VideoSource, sampling: Sampling) -> Iterator[LazyFrame]:
    with source.opened() as video:
        yield from sampling.pick(video.lazy_frames())


def _file(source: VideoSource, sampling: Sampling) -> Iterator[LazyFrame]:
    sparse = sampling.fps is not None and sampling.fps <= _SPARSE
    duration: Fraction | None = None
    last: Fraction | None = None
    table: PacketTable | None = None
    if sampling.count is not None or sparse or (sampling.start or 0) >= _LATE:
        with source.opened() as video:
            table = packet_table(video)
        duration = table.duration
        if table.sound:
            try:
                for frame in _seeking(source, table, sampling):
                    yield frame
                    last = frame.time
                return
            except UnsoundError:
                logger.info("video %s: its packets do not tell its frames; decoding all of it.", source.name)
    with source.opened() as video:
        for frame in sampling.pick(video.lazy_frames(), duration):
            if last is None or frame.time > last:
                yield frame
        if sampling.count is not None and table is not None:  # the last part's middle is not the end
            _check_end(video, table, sampling)


def _seeking(source: VideoSource, table: PacketTable, sampling: Sampling) -> Iterator[LazyFrame]:
    """The same frames as decoding everything gives, found by their packets."""
    times = sampling.times(table.duration)
    if times is not None:
        chosen = at_times(table.lazy_frames(), times)
    else:
        chosen = within(table.lazy_frames(), sampling.begin, sampling.stop)
    with source.opened() as video:
        frames = frames_at(video, table, (frame.index for frame in chosen))
        if sampling.scene is not None:
            frames = scene_changes(frames, sampling.scene)
        yield from Sampling(max_frames=sampling.max_frames).pick(frames)
        _check_end(video, table, sampling)


def _check_end(video: VideoFile, table: PacketTable, sampling: Sampling) -> None:
    """What decoding to the end would have found: that it is cut off."""
    if sampling.max_frames is None and (sampling.stop is None or sampling.stop > table.duration):
        video.reached = float(table.duration)
        video.check_end(table.duration, table.gap)
