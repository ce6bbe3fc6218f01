"""``read_video``: any source of frames → the frames that are wanted, as they are reached."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from .decoding import VideoFile
from .frames import Frame
from .lazy_frames import Shot
from .packets import PacketTable, packet_table
from .sampling import Sampling, at_times, within
from .scenes import scene_changes
from .seeking import UnsoundError, shots_at
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
    return (shot.frame() for shot in read_shots(found, sampling))


def read_shots(source: VideoSource, sampling: Sampling) -> Iterator[Shot]:
    """As :func:`read_video`; a shot's picture is made when it is asked for, which may be in another thread.

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
    return _file(source, sampling) if source.kind == "file" else _stills(source, sampling)


def _stills(source: VideoSource, sampling: Sampling) -> Iterator[Shot]:
    duration = source.still_length()[0] if sampling.count is not None else None
    yield from sampling.pick(source.still_shots(), duration)


def _live(source: VideoSource, sampling: Sampling) -> Iterator[Shot]:
    with source.opened() as video:
        yield from sampling.pick(video.shots())


def _file(source: VideoSource, sampling: Sampling) -> Iterator[Shot]:
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
                for shot in _seeking(source, table, sampling):
                    yield shot
                    last = shot.time
                return
            except UnsoundError:
                logger.info("video %s: its packets do not tell its frames; decoding all of it.", source.name)
    with source.opened() as video:
        for shot in sampling.pick(video.shots(), duration):
            if last is None or shot.time > last:
                yield shot
        if sampling.count is not None and table is not None:  # the last part's middle is not the end
            _check_end(video, table, sampling)


def _seeking(source: VideoSource, table: PacketTable, sampling: Sampling) -> Iterator[Shot]:
    """The same frames as decoding everything gives, found by their packets."""
    times = sampling.times(table.duration)
    if times is not None:
        chosen = at_times(table.shots(), times)
    else:
        chosen = within(table.shots(), sampling.begin, sampling.stop)
    with source.opened() as video:
        shots = shots_at(video, table, (shot.index for shot in chosen))
        if sampling.scene is not None:
            shots = scene_changes(shots, sampling.scene)
        yield from Sampling(max_frames=sampling.max_frames).pick(shots)
        _check_end(video, table, sampling)


def _check_end(video: VideoFile, table: PacketTable, sampling: Sampling) -> None:
    """What decoding to the end would have found: that it is cut off."""
    if sampling.max_frames is None and (sampling.stop is None or sampling.stop > table.duration):
        video.reached = float(table.duration)
        video.check_end(table.duration, table.gap)
