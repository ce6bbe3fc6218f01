"""A video that cannot be read, or not to its end."""

from __future__ import annotations

from ..data.images import BadImageError


class BadVideoError(BadImageError):
    """A video that cannot be used, or not beyond a point. The message names file, time, reason and fix.

    Frames before the damage have been given when it is raised. It is a ``BadImageError``, so that whoever
    leaves out bad images (``on_bad_sample: skip``) leaves out the rest of a bad video.

    Attributes:
        video: its name.
        time: seconds of the last good frame; ``None`` where none was read.
    """

    def __init__(self, video: str, reason: str, fix: str, time: float | None = None) -> None:
        self.video, self.time = video, time
        where = "cannot be read" if time is None else f"cannot be read beyond {time:.3f} s"
        super().__init__(f"video {video} {where}: {reason.rstrip('.')}. {fix}")
