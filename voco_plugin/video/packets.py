"""The packets of a video file, read without decoding a pixel: times, key frames, length."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .decoding import VideoFile, pyav, slack_of
from .lazy_frames import LazyFrame

_ONE_FRAME_A_PACKET = ("h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg")
"""Codecs whose packets are one shown frame each. VP8's may be a hidden one."""


@dataclass(frozen=True)
class PacketTable:
    """The frames of a file by their packets, in the order they are shown.

    Attributes:
        pts: ``(N,)`` int64, in ticks, rising.
        key: ``(N,)`` bool, whether decoding may begin there.
        tick: seconds.
        duration: seconds from the first frame to the end of the last.
        sound: whether the packets tell the frames exactly: each has a time of its own, and the codec has one
            frame a packet. Without it only ``duration`` is to be used.
    """

    pts: np.ndarray
    key: np.ndarray
    tick: Fraction
    duration: Fraction
    sound: bool

    @property
    def gap(self) -> Fraction:
        """Seconds of the longest pause between frames."""
        return int(np.diff(self.pts).max(initial=0)) * self.tick

    def lazy_frames(self) -> list[LazyFrame]:
        """The frames without pictures, for picking."""
        first = int(self.pts[0])
        last = len(self.pts) - 1
        end = self.duration
        times = [(int(pts) - first) * self.tick for pts in self.pts]
        lengths = [Fraction(0)] * last + [end - times[-1]]
        return [
            LazyFrame(time, i, length, _no_picture, slack_of(self.tick))
            for i, (time, length) in enumerate(zip(times, lengths, strict=True))
        ]

    def key_before(self, index: int) -> int:
        """The last key frame at or before a frame; 0 where there is none."""
        keys = np.flatnonzero(self.key[: index + 1])
        return int(keys[-1]) if len(keys) else 0

    def find(self, pts: Any) -> int | None:
        """The number of the frame with this time."""
        place = int(np.searchsorted(self.pts, pts)) if pts is not None else len(self.pts)
        return place if place < len(self.pts) and self.pts[place] == pts else None


def packet_table(video: VideoFile) -> PacketTable:
    """Reads all packets of ``video`` (from where it stands), decoding none.

    Raises:
        BadVideoError: it holds none, or they cannot be read to the end.
    """
    av = pyav()
    pts: list[int] = []
    keys: list[bool] = []
    count, end, whole = 0, Fraction(0), True
    step = 1 / video.rate if video.rate else Fraction(0)
    video.reached = None
    try:
        for packet in video.container.demux(video.stream):
            if not packet.size or packet.is_discard:
                continue
            count += 1
            whole = whole and not packet.is_corrupt
            if packet.pts is None:
                continue
            pts.append(packet.pts)
            keys.append(bool(packet.is_keyframe))
            length = packet.duration * video.tick if packet.duration else step
            there = packet.pts * video.tick + length
            end = there if len(pts) == 1 else max(end, there)
    except av.FFmpegError:
        whole = False  # decoding will meet the same damage, and say where
    if not count:
        raise video.broken("it holds no packet of video")
    order = np.argsort(np.asarray(pts, dtype=np.int64), kind="stable")
    shown = np.asarray(pts, dtype=np.int64)[order]
    timed = len(pts) == count
    duration = end - int(shown[0]) * video.tick if timed else count * step
    distinct = bool((np.diff(shown) > 0).all())
    whole = whole and video.missing() is None
    sound = whole and timed and distinct and video.codec in _ONE_FRAME_A_PACKET
    return PacketTable(shown, np.asarray(keys, dtype=bool)[order], video.tick, duration, sound)


def _no_picture() -> Any:
    raise AssertionError("a packet has no picture")
