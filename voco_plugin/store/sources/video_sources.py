"""The frames of videos as the images of a large job: each video a series, its frames named by their times.

    clip.mp4#12.000s        the frame at 12 s of clip.mp4 (six decimals where three would name two frames)

A video is read in order, by one process; several processes take turns by videos, so a single video keeps one
of them busy. With a sampling every source is a video: a folder of videos is each of them, a folder of images
a video by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.images import IMAGE_SUFFIXES, BadImageError
from ...video import VIDEO_SUFFIXES, BadVideoError, Sampling, probe
from ...video.image_sequence import natural_key
from ...video.reading import read_lazy_frames
from ...video.sources import VideoSource
from .image_items import ImageItem, ImageSource, file_stamp
from .image_sources import expand


@dataclass(frozen=True)
class VideoOptions:
    """How videos become frames.

    Attributes:
        sampling: which frames.
        rate: frames a second of folders of images.
    """

    sampling: Sampling
    rate: float | None = None


class VideoFrames(ImageSource):
    """The frames of several videos, video by video. A damaged video gives the frames before the damage, then
    an item that raises when it is opened.
    """

    random_access = False

    def __init__(self, videos: Sequence[str], options: VideoOptions) -> None:
        self.videos, self.options = list(dict.fromkeys(videos)), options
        self.sampling = str(options.sampling)

    def __iter__(self) -> Iterator[ImageItem]:
        return self.share(0, 1)

    def share(self, rank: int, world: int) -> Iterator[ImageItem]:
        """The frames of every ``world``-th video, from number ``rank`` on."""
        for video in self.videos[rank::world]:
            yield from self._frames(video)

    def about(self, rank: int, world: int) -> int | None:
        """By the durations that headers promise; a damaged video counts for nothing."""
        total = 0
        for video in self.videos[rank::world]:
            try:
                info = probe(video, rate=self._rate(video))
            except BadImageError:
                continue
            count = self.options.sampling.expected(info.duration, info.frames)
            if count is None:
                return None
            total += count
        return total

    def _rate(self, video: str) -> float | None:
        return self.options.rate if Path(video).expanduser().is_dir() else None

    def _frames(self, video: str) -> Iterator[ImageItem]:
        stamp = None if Path(video).is_dir() else file_stamp(video)
        before = ""
        try:
            source = VideoSource.of(video, rate=self._rate(video))
            for frame in read_lazy_frames(source, self.options.sampling):
                time = float(frame.time)
                name = frame_name(video, time)
                unique = frame_name(video, time, digits=6) if name == before else name
                before = name
                yield ImageItem(unique, frame.picture, stamp, video, time)
        except BadVideoError as problem:
            yield ImageItem(video, _raising(problem), None, video)


def frame_name(video: str, time: float, digits: int = 3) -> str:
    """What a frame is called in a store: ``clip.mp4#12.000s``."""
    return f"{video}#{time:.{digits}f}s"


def video_source(sources: Sequence[str], options: VideoOptions, *, missing: bool = False) -> VideoFrames:
    """The frames of the videos that ``sources`` name: files, patterns, folders.

    Args:
        missing: whether a name without a file is kept; it raises when it is read.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder holds no video and no image, or both.
    """
    found: list[str] = []
    for name in (one for source in sources for one in expand(os.fspath(source))):
        path = Path(name).expanduser()
        if path.is_dir():
            found += _in_folder(path)
        elif missing or path.is_file():
            found.append(str(path))
        else:
            raise FileNotFoundError(f"video {name} does not exist.")
    return VideoFrames(found, options)


def _in_folder(folder: Path) -> list[str]:
    names = [e.name for e in os.scandir(folder) if e.is_file() and not e.name.startswith(".")]
    videos = sorted((n for n in names if n.lower().endswith(VIDEO_SUFFIXES)), key=natural_key)
    images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
    if videos and images:
        raise ValueError(
            f"folder {folder} holds videos and images ({videos[0]}, {images[0]}): name the videos, or put "
            "the frames into a folder of their own."
        )
    if not videos and not images:
        raise ValueError(
            f"folder {folder} holds no video ({', '.join(VIDEO_SUFFIXES)}) and no frame of one "
            f"({', '.join(IMAGE_SUFFIXES)})."
        )
    return [str(folder / name) for name in videos] or [str(folder)]


def _raising(problem: BadVideoError) -> Any:
    def read() -> Any:
        raise problem

    return read
