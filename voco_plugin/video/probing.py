"""``probe``: facts of a video, read from its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import BadVideoError
from .packets import packet_table
from .sources import VideoSource


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a video; ``None`` where its headers do not tell.

    Attributes:
        kind: ``file``, ``live``, ``folder``, ``list`` or ``animation``.
        codec: FFmpeg's name.
        size: ``(width, height)`` of the stored picture in pixels, before it is turned upright.
        duration: seconds.
        frames: how many.
        fps: frames a second, on average.
    """

    kind: str
    codec: str | None = None
    size: tuple[int, int] | None = None
    duration: float | None = None
    frames: int | None = None
    fps: float | None = None


def probe(
    source: Any,
    *,
    scan: bool = False,
    rate: float | None = None,
    follow: float | None = None,
    options: Mapping[str, str] | None = None,
) -> VideoInfo:
    """What ``source`` (:func:`~voco_plugin.video.reading.read_video`) is.

    Args:
        scan: read all packets of a file (none is decoded): duration and number of frames are then counted,
            not believed.

    Raises:
        BadVideoError: it cannot be opened, or has no video.
    """
    found = VideoSource.of(source, rate=rate, follow=follow, options=options)
    if found.kind not in ("file", "live"):
        first = next(iter(found.image_frames()), None)
        if first is None:
            raise BadVideoError(found.name, "it holds no frame", "Give at least one.")
        size = first.picture().size
        seconds, count = found.images_length()
        return VideoInfo(found.kind, None, size, float(seconds), count, float(count / seconds))
    with found.opened() as video:
        context = video.stream.codec_context
        known = None if found.kind == "live" else video.announced
        frames: int | None = video.stream.frames or None
        if scan and found.kind == "file":
            table = packet_table(video)
            known = table.duration
            frames = len(table.pts) if table.sound else frames
        lasts = None if known is None else float(known)
        rate_of = None if video.rate is None else float(video.rate)
        return VideoInfo(found.kind, video.codec, (context.width, context.height), lasts, frames, rate_of)
