"""``KeptBlocks``: blocks out of memory, out of a store, or out of stage 1, which runs on a thread of its
own over whatever waits.

    image → key → memory? → store? → [waiting] → stage 1, ``batch_size`` of one K at once → store, memory
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache import VoCoCache, VoCoCacheError
from ..core.attachment import attachment
from ..data.conversations import time_text
from ..data.images import BadImageError
from ..files import atomic_write_text
from ..inference.answering import compress_images
from ..store.keys import fingerprint_of, image_key, key_bytes
from .blocks import Blocks, Compressed, UnknownKeyError
from .engines.request import EngineError

_log = logging.getLogger(__name__)
_VIDEOS = "videos"


@dataclass
class _Job:
    """An image that waits for stage 1, and who waits for it."""

    key: str
    image: Any
    num_tokens: int
    waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future]] = field(default_factory=list)


class KeptBlocks(Blocks):
    """The blocks of one attached model.

    Args:
        model: attached, in evaluation mode.
        processor: its processor.
        store: a :class:`~voco_plugin.store.store.VoCoCacheStore` of the model; one opened for reading is
            read, and what it lacks is kept in memory alone.
        num_tokens: K where a request names none; ``None`` takes the model's.
        batch_size: images of one forward.
        max_memory: bytes of working memory of one forward (``model.compress``).
        memory_bytes: blocks kept in memory, besides those that are in use.
        stop_seconds: that a forward which runs gets when it stops.
        times: whether each frame of a video has its time before it (``<12.0s>``), as the model was trained.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        store: Any = None,
        num_tokens: int | None = None,
        batch_size: int = 8,
        max_memory: int | None = None,
        memory_bytes: int = 256 << 20,
        stop_seconds: float = 10.0,
        times: bool = False,
    ) -> None:
        self.model, self.processor, self.store = model, processor, store
        self.num_tokens = num_tokens or attachment(model).config.num_tokens
        self.batch_size, self.max_memory, self.memory_bytes = batch_size, max_memory, memory_bytes
        self.stop_seconds, self.times = stop_seconds, times
        self._made_by = fingerprint_of(model) if store is None else store.fingerprint
        self._memory: OrderedDict[str, VoCoCache] = OrderedDict()
        self._videos: OrderedDict[str, tuple[tuple[str, ...], tuple[float, ...]]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._hits = self._misses = self._not_stored = 0
        self._seconds = 0.0

    # -- the interface

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="voco-compress", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(self.stop_seconds)
        self._end_all()

    async def of_image(self, image: Any, num_tokens: int | None = None) -> Compressed:
        start = time.perf_counter()
        count = self.num_tokens if num_tokens is None else num_tokens
        key = await asyncio.to_thread(image_key, image, self._made_by, count)
        cache = await asyncio.to_thread(self._kept, key)
        hit = cache is not None
        if cache is None:
            cache = await self._compressed(key, image, count)
        with self._lock:
            self._hits += hit
            self._misses += not hit
        return Compressed(key, cache, (key,), None, hit, time.perf_counter() - start)

    async def of_video(self, frames: Sequence[Any], num_tokens: int | None = None) -> Compressed:
        start = time.perf_counter()
        if not frames:
            raise BadImageError("this video has no frames under these options.")
        found = await asyncio.gather(*(self.of_image(frame.image, num_tokens) for frame in frames))
        keys, times = tuple(one.key for one in found), tuple(frame.time for frame in frames)
        key = hashlib.sha256(json.dumps([keys, times]).encode()).hexdigest()
        await asyncio.to_thread(self._keep_video, key, keys, times)
        cache = VoCoCache.cat([one.cache for one in found])
        hit = all(one.hit for one in found)
        return Compressed(key, cache, keys, self._texts(times), hit, time.perf_counter() - start)

    async def of_key(self, key: str) -> Compressed:
        start = time.perf_counter()
        key_bytes(key)
        cache = await asyncio.to_thread(self._kept, key)
        if cache is not None:
            return Compressed(key, cache, (key,), None, True, time.perf_counter() - start)
        video = await asyncio.to_thread(self._video, key)
        if video is None:
            raise UnknownKeyError(f"nothing is kept under the key {key}; compress the image again.")
        keys, times = video
        parts = [await asyncio.to_thread(self._kept, one) for one in keys]
        if any(part is None for part in parts):
            raise UnknownKeyError(f"frames of the video {key} are no longer kept; compress it again.")
        cache = VoCoCache.cat([part for part in parts if part is not None])
        return Compressed(key, cache, keys, self._texts(times), True, time.perf_counter() - start)

    def state(self) -> dict[str, Any]:
        with self._lock:
            return {
                "waiting": len(self._jobs),
                "hits": self._hits,
                "misses": self._misses,
                "compressed_seconds": self._seconds,
                "kept_bytes": self._bytes,
                "not_stored": self._not_stored,
            }

    # -- what is kept

    def _texts(self, times: Sequence[float]) -> tuple[str | None, ...]:
        return tuple(time_text(at) if self.times else None for at in times)

    def _kept(self, key: str) -> VoCoCache | None:
        with self._lock:
            found = self._memory.get(key)
            if found is not None:
                self._memory.move_to_end(key)
                return found
        if self.store is None:
            return None
        try:
            found = self.store.get(key)
        except KeyError:
            return None
        except VoCoCacheError as problem:
            _log.error("a record of the store cannot be read, and is made anew: %s", problem)
            return None
        self._remember(key, found)
        return found

    def _remember(self, key: str, cache: VoCoCache) -> None:
        with self._lock:
            if key not in self._memory:
                self._bytes += cache.nbytes
            self._memory[key] = cache
            self._memory.move_to_end(key)
            while self._bytes > self.memory_bytes and len(self._memory) > 1:
                _, gone = self._memory.popitem(last=False)
                self._bytes -= gone.nbytes

    def _keep_video(self, key: str, keys: tuple[str, ...], times: tuple[float, ...]) -> None:
        with self._lock:
            self._videos[key] = (keys, times)
            while len(self._videos) > 10_000:
                self._videos.popitem(last=False)
        if self.store is None or self.store.readonly:
            return
        try:
            atomic_write_text(
                Path(self.store.path, _VIDEOS, f"{key}.json"), json.dumps({"keys": keys, "times": times})
            )
        except OSError as problem:
            self._could_not_store(problem)

    def _video(self, key: str) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
        with self._lock:
            if key in self._videos:
                return self._videos[key]
        if self.store is None:
            return None
        try:
            value = json.loads(Path(self.store.path, _VIDEOS, f"{key}.json").read_text(encoding="utf-8"))
            return tuple(map(str, value["keys"])), tuple(map(float, value["times"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as problem:
            _log.error("the list of frames of video %s cannot be read: %s", key, problem)
            return None

    def _could_not_store(self, problem: Exception) -> None:
        with self._lock:
            self._not_stored += 1
        _log.error("a block was not stored, and is kept in memory alone: %s", problem)

    # -- stage 1

    async def _compressed(self, key: str, image: Any, num_tokens: int) -> VoCoCache:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            if self._stopped or self._thread is None:
                raise EngineError("the server is stopping; send the request to another, or again later.")
            job = self._jobs.get(key)
            if job is None:  # who asks for the same image meanwhile waits for the same job
                job = self._jobs[key] = _Job(key, image, num_tokens)
                self._queue.put(job)
            job.waiting.append((loop, future))
        return await future

    def _work(self) -> None:
        ended = False
        while not ended:
            jobs = [self._queue.get()]
            while len(jobs) < self.batch_size and not self._queue.empty():
                jobs.append(self._queue.get())
            ended = None in jobs
            by_tokens: dict[int, list[_Job]] = {}
            for job in jobs:
                if job is not None:
                    by_tokens.setdefault(job.num_tokens, []).append(job)
            for count, some in by_tokens.items():
                try:
                    self._compress(some, count)
                except Exception as problem:  # the thread lives on, whatever it is
                    _log.exception("stage 1 failed")
                    for job in some:
                        self._end(job, EngineError(f"compressing the image failed: {problem}"))
        self._end_all()

    def _end_all(self) -> None:
        """Nothing is compressed any more."""
        with self._lock:
            left = list(self._jobs.values())
        for job in left:
            self._end(job, EngineError("the server was stopped before this image was compressed"))

    def _compress(self, jobs: list[_Job], num_tokens: int) -> None:
        """Stage 1 of ``jobs``, whatever happens in it."""
        start = time.perf_counter()
        refused: dict[int, str] = {}
        try:
            made = list(
                compress_images(
                    self.model, self.processor, [job.image for job in jobs], num_tokens=num_tokens,
                    batch_size=self.batch_size, max_memory=self.max_memory,
                    refused=refused.__setitem__,
                )
            )  # fmt: skip
        except Exception as problem:
            if len(jobs) > 1:  # one of them, or all: each alone tells
                for job in jobs:
                    self._compress([job], num_tokens)
                return
            wrong = isinstance(problem, ValueError)  # of the request; a BadImageError is one
            if not wrong:
                _log.exception("stage 1 failed")
            self._end(jobs[0], problem if wrong else EngineError(f"compressing the image failed: {problem}"))
            return
        with self._lock:
            self._seconds += time.perf_counter() - start
        given = iter(made)
        for number, job in enumerate(jobs):
            if number in refused:
                self._end(job, BadImageError(f"this image cannot be used: {refused[number]}."))
                continue
            cache = next(given).to("cpu")
            if self.store is not None and not self.store.readonly:
                try:
                    self.store.put(job.key, cache)
                    if self.store.values != "keep":
                        cache = self.store.get(job.key)  # everybody reads what the store gives
                except (OSError, VoCoCacheError, KeyError) as problem:
                    self._could_not_store(problem)
            self._remember(job.key, cache)
            self._end(job, cache)

    def _end(self, job: _Job, result: VoCoCache | Exception) -> None:
        with self._lock:
            self._jobs.pop(job.key, None)
            waiting = list(job.waiting)
        for loop, future in waiting:
            try:
                loop.call_soon_threadsafe(_give, future, result)
            except RuntimeError:  # who waited has ended its event loop
                continue


def _give(future: asyncio.Future, result: VoCoCache | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


__all__ = ["KeptBlocks"]
