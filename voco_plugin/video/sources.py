"""``VideoSource``: what may be given as a video, and how each kind is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from . import image_sequence, live
from .decoding import VideoFile
from .errors import BadVideoError
from .lazy_frames import LazyFrame
from .sampling import exact

_DEFAULT_RATE = 1.0


@dataclass(frozen=True)
class VideoSource:
    """A source of frames.

    Attributes:
        kind: ``file``, ``live``, ``folder``, ``list`` or ``animation``.
        what: the path, URL, number of a camera or images.
        name: how errors and names of frames call it.
        rate: frames a second of sources without a clock.
        follow: seconds of patience with a growing file.
        options: FFmpeg's.
    """

    kind: str
    what: Any
    name: str
    rate: Fraction
    follow: float | None = None
    options: Mapping[str, str] | None = None

    @classmethod
    def of(
        cls,
        source: Any,
        *,
        rate: float | None = None,
        follow: float | None = None,
        options: Mapping[str, str] | None = None,
    ) -> VideoSource:
        """See :func:`~voco_plugin.video.reading.read_video`.

        Raises:
            BadVideoError: there is no such file, or it is empty.
            ValueError: an option that means nothing for this source, or a source of no known kind.
        """
        if isinstance(source, VideoSource):
            return source
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"rate={rate} is no speed; give frames a second above 0.")
        kind, what, name = _kind(source, follow)
        if rate is not None and kind in ("file", "live"):
            raise ValueError(f"rate={rate} is for frames without a clock; {name} has its own: leave it out.")
        if follow is not None and kind != "live":
            raise ValueError(f"follow={follow} is for a video file that grows; {name} is none.")
        if options and kind not in ("file", "live"):
            raise ValueError(f"options are FFmpeg's; {name} is not read by it: leave them out.")
        return cls(kind, what, name, exact(_DEFAULT_RATE if rate is None else rate), follow, options)

    @contextmanager
    def opened(self) -> Iterator[VideoFile]:
        """The file or stream through PyAV (kinds ``file`` and ``live``)."""
        if self.kind == "live":
            video = live.open_live(self.what, self.follow, self.options)
        else:
            video = VideoFile(str(self.what), self.name, options={"options": dict(self.options or {})})
        with video:
            yield video

    def image_frames(self) -> Iterator[LazyFrame]:
        """Every frame of a folder, list or animation."""
        if self.kind == "animation":
            return image_sequence.animation(self.what, self.rate)
        images: Sequence[Any] = image_sequence.frame_files(self.what) if self.kind == "folder" else self.what
        return image_sequence.sequence(images, self.rate, self.name)

    def images_length(self) -> tuple[Fraction, int]:
        """``(seconds, frames)`` of a folder, list or animation."""
        if self.kind == "animation":
            return image_sequence.animation_duration(self.what, self.rate)
        count = len(image_sequence.frame_files(self.what) if self.kind == "folder" else self.what)
        return count / self.rate, count


def _kind(source: Any, follow: float | None) -> tuple[str, Any, str]:
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("a list of no images is no video; give at least one.")
        return "list", list(source), f"of {len(source)} images"
    if type(source) is int:
        return "live", source, f"camera {source}"
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"a {type(source).__name__} is no video; give a path, a URL, a camera's number or a list of "
            "images."
        )
    text = os.fspath(source)
    if live.URL.match(text):
        return "live", text, text
    path = Path(text).expanduser()
    if path.is_dir():
        return "folder", path, text
    if follow is not None:
        return "live", path, text
    if not os.path.lexists(path):
        raise BadVideoError(text, "the file does not exist", "Check the name.")
    if path.is_file() and not path.stat().st_size:
        raise BadVideoError(text, "the file is empty", "Copy or record it again.")
    return ("animation" if image_sequence.is_animated(path) else "file"), path, text
