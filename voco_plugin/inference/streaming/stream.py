"""``VideoStream``: a video that comes in frame by frame while questions about it are asked.

stream = session.watch(fps=1, budget=64)            # frames are given to it
stream.feed(frame); session.ask("What is going on?"); stream.feed(frame); session.ask("And now?")

for segment in session.watch("clip.mp4", fps=1):    # it reads a source, in this thread
    ...
with session.watch(0, fps=2, budget="64MB") as stream:      # or in one of its own: a camera, a growing file
    stream.wait(10)
    session.ask("Who has come in?")

Blocks stay outside the conversation's KV cache, where they could never be thinned again. A question reads

    [what was said before the video]  [blocks kept now]  [turns since]  [question]

the first part from the KV cache, the blocks by placing them (their keys are rotated, nothing is computed),
the turns since as text. So each answer is that of one pass over the frames kept at that moment, and memory is
bounded by the budget however long the stream is.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..._moved import renamed
from ...cache import VoCoCache
from ...core.attachment import attachment
from ...video.frames import Frame, Segment
from ..conversation import Conversation, said
from ..prompts import ask as user_turn
from .buffer import BlockBuffer
from .video_prompt import check_layout, video_parts

_STOP_SECONDS = 10.0


class VideoStream(BlockBuffer):
    """A video within a session; made by :meth:`~voco_plugin.inference.session.VoCoSession.watch`.

    Frames may come from one thread and questions from another; a frame that comes while a question is
    answered waits. Close it to go on with the video as it then is: the next question puts it into the
    conversation's KV cache for good.

    Args:
        source: what ``read_video`` takes, an iterable of frames, or ``None``.
        time_text: whether each block has its time before it (``<12.0s>``), as the model was trained.
        history: how many earlier questions and answers about the video a question is read with; ``None``:
            all.
        fps, frames_per_block, frames_as, budget, policy, batch_size, tick: see
            :class:`~voco_plugin.inference.streaming.buffer.BlockBuffer`. A question does not wait for a full
            batch.
        reading: other options of ``read_video``: count, scene, start, end, max_frames.

    Raises:
        ValueError: the session watches another video, or an option is not valid.
    """

    def __init__(
        self,
        session: Conversation,
        source: Any = None,
        *,
        time_text: bool = False,
        history: int | None = None,
        fps: float | None = None,
        frames_per_block: int = 1,
        frames_as: str = "auto",
        budget: int | str | None = None,
        policy: str | None = None,
        batch_size: int = 1,
        tick: Callable[[int], Any] | None = None,
        **reading: Any,
    ) -> None:
        if session._video is not None:
            raise ValueError("this session watches a video already; close() it and ask once more first.")
        if history is not None and history < 0:
            raise ValueError(f"history={history} must be at least 0, or None for all.")
        check_layout(attachment(session.model).config, session.processor, time_text)
        named = _is_name(source)
        super().__init__(
            session.model, session.processor, num_tokens=session.num_tokens, fps=None if named else fps,
            frames_per_block=frames_per_block, frames_as=frames_as, budget=budget, policy=policy,
            batch_size=batch_size, tick=tick,
        )  # fmt: skip
        self.session, self.time_text, self.history = session, time_text, history
        self._source: Iterable[Frame] | None = source
        if named:
            from ...video.reading import read_video

            self._source = read_video(source, fps=fps, **reading)
        elif unused := [name for name, value in reading.items() if value is not None]:
            raise ValueError(f"{', '.join(unused)}: how a file is read; frames that are given are all taken.")
        self._base = list(session.messages)
        self._since: list[tuple[dict[str, Any], dict[str, Any], tuple[VoCoCache, ...]]] = []
        self._known: dict[str, list[int]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ended = False
        session._video = self

    # -- a source

    def __iter__(self) -> Iterator[Segment]:
        """Read the source in this thread: its segments, each when it has been compressed."""
        if self._source is None:
            raise ValueError("there is no source to read: give one to watch(…), or feed() frames.")
        if self._thread is not None:
            raise ValueError("a thread reads the source already.")
        return self._segments(self._source)

    def _segments(self, source: Iterable[Frame]) -> Iterator[Segment]:
        try:
            for frame in source:
                if self._stop.is_set():
                    return
                yield from self._take(frame)
            yield from self.flush(end=True)
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def run(self, each: Callable[[Segment], Any] | None = None) -> VideoStream:
        """Read the source to its end in this thread; ``each`` is called after every block, and may ask."""
        for segment in self:
            if each is not None:
                each(segment)
        return self

    def start(self) -> VideoStream:
        """Read the source in a thread of its own."""
        segments = iter(self)

        def read() -> None:
            try:
                for _ in segments:
                    pass
            except BaseException as problem:  # raised in whoever asks or waits next
                with self._changed:
                    self._error = problem
                    self._changed.notify_all()

        self._thread = threading.Thread(target=read, name="voco-video-stream", daemon=True)
        self._thread.start()
        return self

    def wait(self, blocks: int = 1, timeout: float | None = None) -> bool:
        """Wait until so many blocks have been seen, or the source has ended; whether so many have been.

        Raises:
            Exception: what stopped the thread that reads the source.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.blocks_seen >= blocks or self._ended or self._error is not None, timeout
            )
            self._raise()
            return self.blocks_seen >= blocks

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the source has been read to its end; whether it has been.

        Raises:
            Exception: what stopped the thread that reads it.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        self._raise()
        return self._ended

    def close(self) -> None:
        """No more frames; what is kept stays. The next question puts it into the conversation for good."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
            if self._thread.is_alive():
                warnings.warn(
                    f"the source gives no frame for {_STOP_SECONDS:.0f} s; its thread ends with the next.",
                    stacklevel=2,
                )
        with self._feeding:
            self.flush(end=True)
            self.closed = True
        if not self.blocks_seen:  # there is no video to go on with
            self.session._video = None
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> VideoStream:
        return self.start() if self._source is not None else self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # otherwise the error inside the block is the one to see
                raise

    # -- questions

    def ask(self, question: str, *, remember: bool = True, max_new_tokens: int = 64, **generate: Any) -> str:
        """The answer to ``question`` about what has been seen so far; ``session.ask`` comes here.

        Args:
            remember: whether later questions are read with this one and its answer before them.
            max_new_tokens, generate: as of :meth:`~voco_plugin.inference.session.VoCoSession.ask`.

        Raises:
            ValueError: no block has been seen yet.
            Exception: what stopped the thread that reads the source.
        """
        self.session._check_options(generate)
        with self._changed:
            self._asking += 1
        try:
            self.flush()
            with self._model_lock:
                self._raise()
                return self._answer(question, remember, max_new_tokens, generate)
        finally:
            with self._changed:
                self._asking -= 1
                self._changed.notify_all()

    def _answer(self, question: str, remember: bool, max_new_tokens: int, generate: dict[str, Any]) -> str:
        session, kept = self.session, self.kept
        if not kept:
            raise ValueError(
                "no frame has been seen yet; feed() one, or wait() for the source before you ask."
            )
        waiting = session._waiting
        (turn,) = user_turn(question, sum(map(len, waiting)))
        since = (
            self._since if self.history is None else self._since[max(len(self._since) - self.history, 0) :]
        )
        turns = [*(turn for asked, answered, _ in since for turn in (asked, answered)), turn]
        parts = video_parts([k.time for k in kept], self.time_text)
        turns[0] = {**turns[0], "content": [*parts, *turns[0]["content"]]}
        images = [*(cache for _, _, own in since for cache in own), *waiting]
        answer, past, unread = session._answered(
            turns, VoCoCache.cat([*(k.cache for k in kept), *images]), max_new_tokens, generate, self._base,
            self._known,
        )  # fmt: skip
        if not remember:
            return answer
        self._since.append((turn, said(answer), waiting))
        session._waiting = session._waiting[len(waiting) :]
        if self.closed:  # the blocks no longer change: they and the turns since are in the KV cache for good
            self._since[0][0]["content"] = [*parts, *self._since[0][0]["content"]]
            session._past, session._unread, session._video = past, unread, None
        session.messages = [
            *self._base,
            *(turn for asked, answered, _ in self._since for turn in (asked, answered)),
        ]
        return answer


def _is_name(source: Any) -> bool:
    """Whether ``read_video`` is to read it: a path, URL or camera, or a list of images."""
    if isinstance(source, (list, tuple)):
        return bool(source) and not isinstance(source[0], Frame)
    return isinstance(source, (str, os.PathLike, int))


__all__ = ["VideoStream"]
__getattr__ = renamed(__name__, Watching="VideoStream")
