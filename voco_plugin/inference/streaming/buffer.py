"""``BlockBuffer``: takes frames as they come, and keeps their blocks within a budget; the lower half of
:class:`~voco_plugin.inference.streaming.stream.VideoStream`.

One thread feeds, others may look: a block is in or not, never half.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from ...cache import VoCoCache
from ...video.frames import Frame, Segment
from .budget import KeepAll, KeptBlock, check_policy, make_policy, parse_budget
from .compress_frames import compress_segments, resolve_frames_as
from .stream_report import summary

_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(model: Any) -> Any:
    """One lock per model: stage 1 shortens its last layer while it runs, and a question must not see that."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


class BlockBuffer:
    """The blocks of a video that are kept, frame by frame.

    Args:
        model, processor: an attached model and its processor.
        num_tokens: K a block; ``None`` takes the model's.
        fps: take the first frame of each period of 1 / fps seconds; ``None``: every frame.
        frames_per_block, frames_as, tick: see
            :func:`~voco_plugin.inference.streaming.compress_frames.compress_segments`.
        budget, policy: see :mod:`~voco_plugin.inference.streaming.budget`.
        batch_size: segments that are compressed at a time.

    Attributes:
        frames_seen, blocks_seen: what has been compressed so far.

    Raises:
        ValueError: an option is not valid.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        num_tokens: int | None = None,
        fps: float | None = None,
        frames_per_block: int = 1,
        frames_as: str = "auto",
        budget: int | str | None = None,
        policy: str | None = None,
        batch_size: int = 1,
        tick: Callable[[int], Any] | None = None,
    ) -> None:
        resolve_frames_as(processor, frames_per_block, frames_as)
        parse_budget(budget)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        if fps is not None and not fps > 0:
            raise ValueError(f"fps={fps} must be more than 0.")
        self.budget, self.policy = budget, check_policy(policy, budget)
        self.frames_seen = self.blocks_seen = 0
        self.closed = False
        self._tools, self._fps = (model, processor), fps
        self._options: dict[str, Any] = {
            "num_tokens": num_tokens, "frames_per_block": frames_per_block, "frames_as": frames_as,
            "tick": tick,
        }  # fmt: skip
        self._size, self._batch = frames_per_block, batch_size
        self._group: list[Frame] = []  # frames of a segment that is not complete yet
        self._pending: list[Segment] = []  # segments that are not compressed yet
        self._last = self._due = float("-inf")
        self._start: float | None = None
        self._kept: KeepAll | None = None
        self._model_lock, self._feeding = lock_of(model), threading.RLock()
        self._changed = threading.Condition()  # guards the blocks that are kept; notified of every new one
        self._asking = 0  # questions that wait; frames let them go first

    def feed(self, frame: Frame) -> None:
        """The next frame of the video.

        Raises:
            ValueError: it is earlier than the one before it, or the stream is closed.
        """
        self._take(frame)

    def _take(self, frame: Frame) -> list[Segment]:
        """Take a frame, after the questions that wait; the segments that were compressed with it."""
        with self._changed:  # locks are not fair: without this a fast source would keep questions waiting
            self._changed.wait_for(lambda: not self._asking)
        with self._feeding:
            return self._read(frame)

    def _read(self, frame: Frame) -> list[Segment]:
        self._check_open(frame.time)
        self._last = frame.time
        if self._fps is not None:
            if frame.time < self._due:
                return []
            start = self._start = frame.time if self._start is None else self._start
            self._due = start + (int((frame.time - start) * self._fps + 1e-6) + 1) / self._fps - 1e-6
        self._group.append(frame)
        if len(self._group) == self._size:
            self._pending.append(Segment(tuple(self._group)))
            self._group = []
        return self._compress() if len(self._pending) >= self._batch else []

    def add(self, cache: VoCoCache, time: float, end: float | None = None, frames: int = 1) -> None:
        """The next block of the video, compressed already (of a cache file, or a store).

        Args:
            cache: of one block.
            time, end: seconds of its first and last frame.

        Raises:
            ValueError: not one block, earlier than the one before it, or the stream is closed.
        """
        if len(cache) != 1:
            raise ValueError(f"a block of a video is one block, not {len(cache)}; add cache[i], one by one.")
        with self._feeding:
            self._check_open(time)
            self.flush()
            self._last = time if end is None else end
            self._keep(cache, time, self._last, frames)

    def flush(self, *, end: bool = False) -> list[Segment]:
        """Compress what waits for a full batch; with ``end`` also a last segment that is shorter."""
        with self._feeding:
            if end and self._group:
                self._pending.append(Segment(tuple(self._group)))
                self._group = []
            return self._compress()

    def _compress(self) -> list[Segment]:
        pending, self._pending = self._pending, []
        if not pending:
            return []
        with self._model_lock:
            made = list(compress_segments(*self._tools, pending, batch_size=len(pending), **self._options))
        for segment, cache in made:
            self._keep(cache, segment.time, segment.end, len(segment.frames))
        return pending

    def _keep(self, cache: VoCoCache, time: float, end: float, frames: int) -> None:
        with self._changed:
            if self._kept is None:
                self._kept = make_policy(self.policy, self.budget, cache.blocks[0])
            self._kept.add(KeptBlock(cache, time, end, frames, self.blocks_seen))
            self.blocks_seen += 1
            self.frames_seen += frames
            self._changed.notify_all()

    def _check_open(self, time: float) -> None:
        if self.closed:
            raise ValueError("this video is closed; open another: session.watch(…).")
        if time < self._last:
            raise ValueError(
                f"a frame at {time:g} s comes after one at {self._last:g} s; give frames in order of time."
            )

    @property
    def kept(self) -> tuple[KeptBlock, ...]:
        """The blocks that a question would be answered from now, in order of time."""
        with self._changed:
            return () if self._kept is None else self._kept.kept

    @property
    def num_blocks(self) -> int:
        """How many blocks are kept."""
        return len(self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are kept."""
        return sum(k.cache.nbytes for k in self.kept)

    def report(self) -> dict[str, Any]:
        """What has been seen and what was kept of it, as values; see
        :func:`~voco_plugin.inference.streaming.stream_report.summary`.
        """
        with self._changed:
            return summary(self._kept, self.policy, self.frames_seen, self.blocks_seen)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.report()['text']})"
