"""Few frames of a long file: jumps to the key frame before each, where that is less than decoding on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from .decoding import VideoFile
from .lazy_frames import LazyFrame
from .packets import PacketTable

_WORTH_A_SEEK = 8
"""Frames that must be saved: a seek empties the decoder."""


_FARTHER_BACK = (0, 1, 10)
"""Seconds before a key frame at which a container is asked for it."""


class UnsoundError(Exception):
    """The file's frames are not what its packets said: it must be decoded from the start."""


def frames_at(video: VideoFile, table: PacketTable, indices: Iterable[int]) -> Iterator[LazyFrame]:
    """The frames of these numbers (rising), as decoding everything would give them.

    Raises:
        BadVideoError: what must be decoded is damaged.
        UnsoundError: a frame decodes to another time than its packet's.
    """
    first = int(table.pts[0])
    frames: Iterator[Any] = iter(())
    position = -1  # the frame that the decoder gives next; -1: nothing has been asked of it
    for index in indices:
        key = table.key_before(index)
        if position < 0 or key >= position + _WORTH_A_SEEK:
            frames, position = _from(video, table, key)
        while True:
            frame = next(frames, None)
            if frame is None:
                raise UnsoundError
            found = table.find(frame.pts)
            if found != position:
                raise UnsoundError
            position = found + 1
            time = (int(frame.pts) - first) * table.tick
            video.reached = float(time)
            if found == index:
                yield video.lazy_frame(frame, time, index)
                break


def _from(video: VideoFile, table: PacketTable, key: int) -> tuple[Iterator[Any], int]:
    """The decoder's frames from a key frame on. What comes before it is dropped.

    Raises:
        UnsoundError: the container does not lead there.
    """
    wanted = int(table.pts[key])
    reached = float((wanted - int(table.pts[0])) * table.tick)
    for seconds in _FARTHER_BACK:
        target = wanted - int(seconds / table.tick)
        video.container.seek(target, stream=video.stream, backward=True)
        frames = video.frames(reached, joined=True)
        for frame in frames:
            if frame.pts is None or frame.pts > wanted:
                break  # too late: MPEG-TS looks for decoding times, which are earlier
            if frame.pts == wanted:
                return itertools.chain([frame], frames), key
    raise UnsoundError
