"""A video file or stream through PyAV: its frames in order, with exact times, until it ends or is damaged.

Times are pts * time_base, from the first frame on: a variable frame rate is as right as a constant one. The
display matrix (how a phone was held) is applied. One decoded frame is held at a time. Audio is not read.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from PIL import Image

from .errors import BadVideoError
from .lazy_frames import LazyFrame

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".flv", ".wmv",
    ".3gp", ".ogv", ".vob", ".mxf", ".y4m", ".h264", ".hevc",
)  # fmt: skip
_REPAIR = "Repair it (ffmpeg -i IN -c copy OUT often does), or use what comes before (on_bad_sample: skip)."
_OTHER = "Give a video that FFmpeg can read."
_DURATION = re.compile(r"^(\d+):(\d\d):(\d\d(?:\.\d+)?)$")
_ROUNDING = Fraction(1, 2000)
_NOISE = 0x10000 // 100
_PARTS = struct.Struct("=9i")
_TURNS: dict[tuple[int, int, int, int], Image.Transpose] = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""Display matrices (signs of a, b, c, d) by what turns the stored picture into the shown one."""


def pyav() -> Any:
    """The ``av`` module.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import av
    except ImportError as problem:
        raise ImportError(
            f"reading a video needs PyAV ({problem}): pip install 'voco_plugin[video]', or give a folder of "
            "frames."
        ) from None
    return av


def _unparsed(file: Any) -> Any:
    """A file's path as FFmpeg takes it unparsed: it reads ``2024-01-01T12:30:00.mp4`` as a protocol."""
    if isinstance(file, (str, os.PathLike)) and os.path.isfile(file):
        return f"file:{os.path.abspath(file)}"
    return file


class VideoFile:
    """An open video; a context manager.

    Args:
        file: what ``av.open`` takes: a path, a URL, a device, an object with ``read``.
        name: how errors call it.
        live: it is being made while it is read: it may begin in the middle and end anywhere.
        options: for ``av.open``: ``format``, ``timeout``, ``options`` (FFmpeg's).

    Raises:
        BadVideoError: it cannot be opened, or has no video.
    """

    def __init__(
        self, file: Any, name: str, *, live: bool = False, options: Mapping[str, Any] | None = None
    ) -> None:
        av = pyav()
        self.name, self.live = name, live
        self.reached: float | None = None
        try:
            self.container = av.open(_unparsed(file), **dict(options or {}))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise BadVideoError(name, _reason(error), _OTHER) from None
        try:
            self.stream = self._video_stream()
        except BaseException:
            self.container.close()
            raise
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.rate: Fraction | None = Fraction(rate) if rate else None
        self.tick = Fraction(self.stream.time_base or Fraction(1, 1000))

    def _video_stream(self) -> Any:
        from av.stream import Disposition

        streams = list(self.container.streams)
        for stream in streams:
            if stream.type == "video" and not stream.disposition & Disposition.attached_pic:
                return stream  # not the cover of a piece of music
        kinds = [stream.type for stream in streams]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        raise BadVideoError(self.name, f"it holds no video stream ({counts or 'no streams'})", _OTHER)

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.container.close()

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec."""
        return str(self.stream.codec_context.name)

    @property
    def announced(self) -> Fraction | None:
        """Seconds that the headers promise of the video stream; ``None`` where they say nothing of it."""
        if self.stream.duration:
            return Fraction(self.stream.duration) * self.tick
        match = _DURATION.match(str(self.stream.metadata.get("DURATION", "")))
        if match:
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
        if self.container.duration and len(self.container.streams) == 1:
            return Fraction(self.container.duration, 1_000_000)
        return None

    def frames(self, after: float | None = None, *, joined: bool = False) -> Iterator[Any]:
        """The frames that PyAV decodes, in the order of their times.

        Args:
            after: seconds of the last good frame before, for errors.
            joined: decoding begins in the middle: frames that refer to earlier ones are damaged, and skipped
                until the first whole one. A live source is always read so.

        Raises:
            BadVideoError: a packet or frame is damaged, or the data cannot be read on. A damaged picture is
                not given, and nothing after it.
        """
        av = pyav()
        self.reached = after
        damage, good, due = "", not (joined or self.live), None
        try:
            for packet in self.container.demux(self.stream):
                if packet.is_corrupt and good:
                    damage, due = "a packet of it is damaged or cut off", _due(packet)
                    break
                if not packet.size and (missing := self.missing()) is not None:
                    damage, due = "it is cut off: the rest of what its index lists is missing", missing
                    break
                due = _due(packet)
                for frame in packet.decode():
                    if frame.is_corrupt:
                        if not good:
                            continue
                        raise self.broken("a frame of it is damaged")
                    good = True
                    yield frame
        except av.FFmpegError as error:
            damage = _reason(error)
        if damage:
            yield from self._frames_left(due)
            raise self.broken(damage)

    def missing(self) -> int | None:
        """When the first packet is due that the container's index lists and the file is too short for, in
        ticks. FFmpeg marks a packet that is cut in two; a cut between two looks like the end of the video.

        Only where the index came before the pictures (MP4) and PyAV tells it (17 and later).
        """
        size = self.container.size
        entries = () if self.live or size <= 0 else getattr(self.stream, "index_entries", ())
        lost = [entry.timestamp for entry in entries if entry.pos + entry.size > size]
        return min(lost, default=None)

    def _frames_left(self, due: int | None) -> Iterator[Any]:
        """Frames from before the damage that the decoder still holds.

        It holds frames that are shown later than one that is lost, too (B-frames are decoded after those
        between which they stand). Nothing that is lost is shown before ``due``, when the last packet that was
        read, or the first that is lost, is to be decoded.
        """
        with contextlib.suppress(pyav().FFmpegError):
            for frame in self.stream.codec_context.decode(None):
                if frame.is_corrupt or due is None or frame.pts is None or frame.pts >= due:
                    return
                yield frame

    def broken(self, reason: str) -> BadVideoError:
        """The error that says it is damaged at this point."""
        return BadVideoError(self.name, reason, _REPAIR, self.reached)

    def lazy_frames(self) -> Iterator[LazyFrame]:
        """Every frame, from the first on.

        Raises:
            BadVideoError: as :meth:`frames`; or its times go back, or it ends long before the time its
                headers promise, or it holds no frame.
        """
        origin: Fraction | None = None
        last: LazyFrame | None = None
        gap = Fraction(0)
        for index, frame in enumerate(self.frames()):
            time = self.time_of(frame, index)
            origin = time if origin is None else origin
            current = self.lazy_frame(frame, time - origin, index)
            if last is not None and current.time < last.time:
                raise self.broken(f"its time stamps go back to {float(current.time):.3f} s")
            gap = max(gap, current.time - last.time) if last is not None else gap
            last, self.reached = current, float(current.time)
            yield current
        if last is None:
            raise BadVideoError(self.name, "it holds no frame that can be decoded", _OTHER)
        self.check_end(last.time + last.length, gap)

    def check_end(self, end: Fraction, gap: Fraction) -> None:
        """Raises where the video ends more than a second, and three times its longest pause, before the end
        that its headers promise.

        Args:
            end: seconds of the end that was found.
            gap: seconds of the longest pause between frames.
        """
        promised = None if self.live else self.announced
        if promised is not None and end + max(Fraction(1), 3 * gap) < promised:
            raise self.broken(f"it ends there, where its headers promise {float(promised):.3f} s: cut off")

    def lazy_frame(self, frame: Any, time: Fraction, index: int) -> LazyFrame:
        """A decoded frame at ``time``, still in the decoder's colours."""
        tick = Fraction(frame.time_base or self.tick)
        length = frame.duration * tick if frame.duration else (1 / self.rate if self.rate else Fraction(0))
        return LazyFrame(time, index, length, lambda: self.picture(frame), slack_of(tick))

    def picture(self, frame: Any) -> Image.Image:
        """A decoded frame as 8-bit RGB, the right way up. The matrix and range that the stream names for its
        colours are used; no tone mapping, no deinterlacing, pixels are taken as square.

        Raises:
            BadVideoError: it is to be shown at an angle that is not a multiple of 90 degrees.
        """
        image = frame.to_image()
        matrix = frame.side_data.get("DISPLAYMATRIX")
        turn = None if matrix is None else _turn(bytes(matrix))
        if isinstance(turn, str):
            reason = f"its frames are to be shown at {-frame.rotation} degrees"
            fix = "Turn it upright first (ffmpeg -i IN OUT does)."
            raise BadVideoError(self.name, reason, fix, self.reached)
        return image if turn is None else image.transpose(turn)

    def time_of(self, frame: Any, index: int) -> Fraction:
        """Seconds by the clock of the file; by its frame rate where the frame carries no time.

        Raises:
            BadVideoError: it carries no time and there is no rate.
        """
        if frame.pts is not None:
            return frame.pts * Fraction(frame.time_base or self.tick)
        if self.rate is None:
            raise self.broken("its frames carry no time and it names no frame rate")
        return index / self.rate


def _due(packet: Any) -> int | None:
    """When a packet is to be decoded, in ticks: what it holds is shown no earlier."""
    return packet.pts if packet.dts is None else packet.dts


def slack_of(tick: Fraction) -> Fraction:
    """By how many seconds a time may be rounded: half a tick, but at most half a millisecond (one tick of AVI
    is a whole frame).
    """
    return min(tick / 2, _ROUNDING)


def _turn(matrix: bytes) -> Image.Transpose | None | str:
    """What a display matrix asks for; a string where it is neither a quarter turn nor a mirror."""
    a, b, _, c, d, *_ = _PARTS.unpack(matrix[: _PARTS.size])
    signs = tuple((part > _NOISE) - (part < -_NOISE) for part in (a, b, c, d))
    return None if signs == (1, 0, 0, 1) else _TURNS.get(signs, "odd")  # type: ignore[call-overload]


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    text = getattr(error, "strerror", None) or str(error)
    if "Invalid data found" in text:
        return "its data is damaged, incomplete or no video (FFmpeg: invalid data)"
    return " ".join(text.split()) or type(error).__name__
