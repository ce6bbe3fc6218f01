"""Live sources: cameras, network streams, files that grow."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from .decoding import VideoFile
from .errors import BadVideoError

URL = re.compile(r"^[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_POLL = 0.1
_OPEN_SECONDS, _READ_SECONDS = 30.0, 30.0


class GrowingFile:
    """A file that another process is writing, as PyAV reads one: ``read`` waits for more, and ends when the
    file has not grown for ``patience`` seconds. There is no seeking in it, so its format must be one that is
    written in order (MPEG-TS, Matroska, fragmented MP4, FLV).
    """

    def __init__(self, path: str, patience: float, poll: float = _POLL) -> None:
        if not patience > 0:
            raise ValueError(f"follow={patience} waits for nothing; give seconds above 0.")
        self.path, self.patience, self.poll = path, patience, poll
        self.name = path  # PyAV asks for it
        self._file = open(path, "rb", buffering=0)

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        until = time.monotonic() + self.patience
        while True:
            found = self._file.read(size)
            if found or time.monotonic() >= until:
                return found or b""
            time.sleep(self.poll)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def is_live(source: Any, follow: float | None) -> bool:
    """Whether a source is read as it comes: a camera's number, a URL, a followed file."""
    return follow is not None or type(source) is int or (isinstance(source, str) and bool(URL.match(source)))


def open_live(source: Any, follow: float | None, options: Mapping[str, str] | None) -> VideoFile:
    """A live source, opened.

    Args:
        source: the number of a camera (Linux and macOS), a URL, or the path of a file.
        follow: seconds without growth after which a file has ended.
        options: FFmpeg's, such as ``{"rtsp_transport": "tcp"}`` or ``{"video_size": "640x480"}``.

    Raises:
        BadVideoError: it cannot be opened.
        ValueError: cameras have no numbers on this system, or ``follow`` is given for what is not a file.
    """
    given: dict[str, Any] = {"options": dict(options or {})}
    if type(source) is int:
        device, given["format"] = _camera(source)
        return VideoFile(device, f"of camera {source}", live=True, options=_not_following(follow, given))
    name = os.fspath(source)
    if URL.match(name):
        given["timeout"] = (_OPEN_SECONDS, _READ_SECONDS)
        return VideoFile(name, _without_password(name), live=True, options=_not_following(follow, given))
    assert follow is not None
    try:
        file = GrowingFile(name, follow)
    except OSError as problem:
        missing = isinstance(problem, FileNotFoundError)
        reason = "the file does not exist" if missing else str(problem.strerror)
        raise BadVideoError(name, reason, "Follow a file once its recording has begun.") from None
    return VideoFile(file, name, live=True, options=given)


def _camera(number: int) -> tuple[str, str]:
    """What FFmpeg calls a camera, and the device format it is read through."""
    if number < 0:
        raise ValueError(f"camera {number} is none; give a number from 0 on.")
    if sys.platform.startswith("linux"):
        return f"/dev/video{number}", "v4l2"
    if sys.platform == "darwin":
        return str(number), "avfoundation"
    raise ValueError(f"cameras have no numbers on {sys.platform}; give the URL of a stream instead.")


def _not_following(follow: float | None, given: dict[str, Any]) -> dict[str, Any]:
    if follow is not None:
        raise ValueError("follow is for files that grow; a camera or URL is followed anyway: leave it out.")
    return given


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", url)
