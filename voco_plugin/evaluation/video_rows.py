"""Rows whose frames are read from video files when a row is taken: what `voco eval` asks video sets with."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from voco_plugin.data.conversations import time_text
from voco_plugin.data.images import BadImageError
from voco_plugin.evaluation.video_qa import MATCH, VideoRow, same_answer


def read_frames(path: Path, count: int | None, fps: float | None) -> list[Any]:
    """The frames of a file (`image`, `time` in seconds), evenly spaced or at `fps`.

    Raises:
        BadImageError: the file is missing or cannot be read; the message names it.
        ImportError: what reads videos is not installed.
    """
    reading = importlib.import_module("voco_plugin.video.reading")
    if not path.is_file():
        raise BadImageError(f"video {path} does not exist.")
    try:
        frames = list(reading.read_video(str(path), count=count, fps=fps))
    except BadImageError:
        raise
    except (OSError, ValueError) as problem:
        raise BadImageError(f"video {path} cannot be read: {problem}") from None
    if not frames:
        raise BadImageError(f"video {path} holds no frame.")
    return frames


class VideoDataset:
    """As much of a `datasets.Dataset` as an evaluation uses; each row is a video and its questions.

    A row has `id`, `messages`, `types`, `times` (time texts, or None) and, unless removed, `images`.

    Args:
        rows: of `video_qa.video_rows`.
        count, fps: one of them: how many frames of each video, or how many a second.
        times: whether frames have time texts.
    """

    is_video = True
    match = staticmethod(same_answer)
    match_rule = MATCH

    def __init__(
        self,
        rows: Sequence[VideoRow],
        *,
        count: int | None = None,
        fps: float | None = None,
        times: bool = False,
    ) -> None:
        if (count is None) == (fps is None):
            raise ValueError(f"count={count} and fps={fps}: give one of them")
        self.rows = list(rows)
        self.count, self.fps, self.times = count, fps, times
        self.column_names = ["id", "messages", "images", "types", "times"]
        self._times: dict[Path, list[float]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Row `number`; its video is decoded if images are asked for, or its times are not known yet.

        Raises:
            BadImageError: the video cannot be read.
        """
        row = self.rows[number]
        found: dict[str, Any] = {"id": row.path.name, "messages": _messages(row)}
        found["types"] = [item.type for item in row.items]
        if "images" in self.column_names:
            frames = read_frames(row.path, self.count, self.fps)
            self._times[row.path] = [frame.time for frame in frames]
            found["images"] = [frame.image for frame in frames]
        if "times" in self.column_names:
            if row.path not in self._times:
                self._times[row.path] = [f.time for f in read_frames(row.path, self.count, self.fps)]
            seconds = self._times[row.path]
            found["times"] = [time_text(at) if self.times else None for at in seconds]
        return found

    def select(self, indices: Iterable[int]) -> VideoDataset:
        return self._like([self.rows[i] for i in indices], self.column_names)

    def remove_columns(self, names: str | Sequence[str]) -> VideoDataset:
        gone = [names] if isinstance(names, str) else list(names)
        return self._like(self.rows, [name for name in self.column_names if name not in gone])

    def _like(self, rows: list[VideoRow], columns: list[str]) -> VideoDataset:
        made = VideoDataset(rows, count=self.count, fps=self.fps, times=self.times)
        made.column_names = list(columns)
        made._times = self._times  # shared: a video is decoded once for its times
        return made


def _messages(row: VideoRow) -> list[dict[str, Any]]:
    messages = []
    for item in row.items:
        for role, text in (("user", item.question), ("assistant", item.answer)):
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    return messages
