"""``compress_dataset``: stage 1 over any number of images: open, key, compress what is not there yet, write.

    source → (known by name? done) → decode → key → (known by key? done) → batch → compress → sinks

A batch is written in one transaction, so a run that is killed loses at most the batch in flight, and the next
run computes nothing twice. Memory holds one batch and the few images that are decoded ahead of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ...cache import VoCoCache
from ...cache.fingerprint import as_told
from ...core.attachment import evaluating
from ...data.images import BadImageError, check_on_bad_sample
from ...inference.answering import compress_images
from ..keys import fingerprint_of, image_key
from ..names import NameEntry
from ..shards import SHARD_BYTES
from ..sources.image_items import ImageItem
from ..sources.image_sources import image_source
from ..store import VoCoCacheStore
from .prefetch import prefetch
from .sinks import Finished, ShardSink, Sink, StoreSink
from .videos import SeriesSeen

_NAMES_AT_ONCE = 256


@dataclass
class Counts:
    """What has happened so far; ``images = computed + hits + skipped`` at the end.

    Attributes:
        images: looked at.
        computed: ran through the model.
        hits: needed no computation: there already, or the pixels of another image of this run.
        by_name: of the hits, those whose pixels were not even read.
        skipped: left out as unusable.
        bytes_written: keys and values of the caches written, in bytes.
        vision_bytes: what keys and values of the compressed vision tokens would have taken, in bytes.
    """

    images: int = 0
    computed: int = 0
    hits: int = 0
    by_name: int = 0
    skipped: int = 0
    bytes_written: int = 0
    vision_bytes: int = 0


@dataclass
class _Waiting:
    """An image of the batch to come, with every name its pixels have come under."""

    image: Any
    key: str
    names: list[NameEntry] = field(default_factory=list)


def compress_dataset(
    model: Any,
    processor: Any,
    source: Any,
    store: VoCoCacheStore | str | os.PathLike | None = None,
    *,
    shards: str | None = None,
    num_tokens: int | None = None,
    batch_size: int = 8,
    max_memory: int | None = None,
    on_bad_sample: str = "raise",
    threads: int = 2,
    shard_bytes: int = SHARD_BYTES,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[Counts], Any] | None = None,
    refused: Callable[[str, str], Any] | None = None,
) -> dict[str, Any]:
    """Compress every image of ``source`` (paper, Sec. 3.3, stage 1) into a store, into shards, or both.

    Args:
        model, processor: a model with VoCo attached, and its processor.
        source: anything :func:`~voco_plugin.store.sources.image_sources.image_source` reads.
        store: a ``VoCoCacheStore`` opened for this model, or the folder of one, made where it is missing.
        shards: where Parquet shards go, as fsspec names it (``s3://bucket/prefix``, ``file:///folder``).
        num_tokens: K; ``None`` takes the model's.
        batch_size: images at a time.
        max_memory: bytes that one forward may take (see ``compress_images``).
        on_bad_sample: ``raise``, or ``skip`` images that cannot be used.
        threads: that decode images ahead of the model; 0 decodes in turn.
        shard_bytes: size of a shard.
        rank, world: this process's share: every ``world``-th image, from number ``rank`` on.
        progress: called with the counts after each image that needed no computation and after each batch.
        refused: called with the name of each image left out, and why.

    Returns:
        the counts, ``seconds``, ``images_per_second``, ``skipped_images`` (``{"image", "reason"}``) and
        ``evicted``: caches of this run that the store's size limit has driven out already.

    Raises:
        BadImageError: an image cannot be used, and ``on_bad_sample`` is ``raise``.
        ValueError: neither store nor shards are given, or nothing could be used.
        VoCoCacheError: the store or the shards are another model's, or damaged.
    """
    if store is None and shards is None:
        raise ValueError("nowhere to write: give a store, shards, or both.")
    check_on_bad_sample(on_bad_sample)
    images = image_source(source, missing=on_bad_sample == "skip")
    made_by = fingerprint_of(model)
    tokens = made_by["num_tokens"] if num_tokens is None else num_tokens
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if store is not None and not isinstance(store, VoCoCacheStore):
            store = stack.enter_context(VoCoCacheStore.for_model(store, model))
        stack.enter_context(evaluating(model))
        sinks: list[Sink] = []
        store_sink = StoreSink(store) if store is not None else None
        if store_sink is not None:
            stack.callback(store_sink.close)
            sinks.append(store_sink)
        if shards is not None:
            sinks.append(ShardSink(shards, made_by, shard_bytes))
            stack.callback(sinks[-1].close)  # after an error too: what is finished is worth a small shard
        job = _Job(
            compute=partial(
                compress_images, model, processor, num_tokens=tokens, batch_size=batch_size,
                max_memory=max_memory,
            ),
            key=partial(
                image_key, made_by=as_told(made_by, [sink.made_by for sink in sinks]), num_tokens=tokens
            ),
            tokens=tokens, sinks=sinks, store_sink=store_sink, batch_size=batch_size,
            skip=on_bad_sample == "skip", progress=progress, refused=refused,
        )  # fmt: skip
        job.run(images.share(rank, world), threads)
        for series in job.series.found(tokens, images.sampling, job.left_out):
            for sink in sinks:
                sink.keep_series(series)
        evicted = sum(key not in store for key in job.written) if store is not None else 0
    seconds = time.perf_counter() - start
    return {
        **asdict(job.counts), "seconds": seconds, "images_per_second": job.counts.images / max(seconds, 1e-9),
        "skipped_images": job.left_out, "evicted": evicted,
    }  # fmt: skip


@dataclass
class _Job:
    """One run over a share of the images, and its state between them."""

    compute: Callable[..., Iterator[VoCoCache]]
    key: Callable[[Any], str]
    tokens: int
    sinks: list[Sink]
    store_sink: StoreSink | None
    batch_size: int
    skip: bool
    progress: Callable[[Counts], Any] | None
    refused: Callable[[str, str], Any] | None
    counts: Counts = field(default_factory=Counts)
    left_out: list[dict[str, str]] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    batch: dict[str, _Waiting] = field(default_factory=dict)
    new_names: list[NameEntry] = field(default_factory=list)
    series: SeriesSeen = field(default_factory=SeriesSeen)

    def run(self, items: Iterator[ImageItem], threads: int) -> None:
        try:
            depth = self.batch_size + threads
            for item, found in prefetch(self._look, self._unknown(items), threads, depth):
                if isinstance(found, BadImageError):
                    self._leave_out(item.name, str(found))
                else:
                    self._take(NameEntry(item.name, self.tokens, found[1], item.stamp), found[0])
            self._finish_batch()
        finally:
            self._write_names()

    def _unknown(self, items: Iterator[ImageItem]) -> Iterator[ImageItem]:
        """The items that are not finished under their name and stamp."""
        for item in items:
            self.series.see(item)
            if item.stamp is not None and all(self._known(sink, item) for sink in self.sinks):
                self.counts.by_name += 1
                self._hit()
            else:
                yield item

    def _known(self, sink: Sink, item: ImageItem) -> bool:
        entry = sink.entry(item.name, self.tokens)
        return entry is not None and entry.stamp == item.stamp

    def _look(self, item: ImageItem) -> tuple[ImageItem, Any]:
        """Decode an image and hash its pixels; runs in a thread."""
        try:
            image = item.open()
            return item, (image, self.key(image))
        except BadImageError as problem:
            return item, problem

    def _take(self, entry: NameEntry, image: Any) -> None:
        if entry.key in self.batch:  # the same pixels, a moment ago
            self.batch[entry.key].names.append(entry)
            self._hit()
        elif all(sink.has(entry.key) for sink in self.sinks):
            self._name(entry)
            self._hit()
        elif not self._copied(entry):
            self.batch[entry.key] = _Waiting(image, entry.key, [entry])
            if len(self.batch) >= self.batch_size:
                self._finish_batch()

    def _copied(self, entry: NameEntry) -> bool:
        """Whether the store has it, and the other sinks have it from there now."""
        others = len(self.sinks) > 1
        cache = self.store_sink.read(entry.key) if self.store_sink is not None and others else None
        if cache is None:
            return False
        for sink in self.sinks:
            if not sink.has(entry.key):
                self.counts.bytes_written += sink.write([Finished([entry], entry.key, cache)])
        self._name(entry)
        self._hit()
        return True

    def _finish_batch(self) -> None:
        if not self.batch:
            return
        waiting = list(self.batch.values())
        refused: set[int] = set()

        def refuse(number: int, reason: str) -> None:
            refused.add(number)
            names = waiting[number].names
            self.counts.hits -= len(names) - 1  # its twins, counted as hits, are as unusable
            self.counts.images -= len(names) - 1
            for entry in names:
                self._leave_out(entry.name, f"image {entry.name} cannot be used: {reason}.")

        made = list(self.compute([one.image for one in waiting], refused=refuse))
        usable = [one for number, one in enumerate(waiting) if number not in refused]
        finished = [Finished(w.names, w.key, c) for w, c in zip(usable, made, strict=True)]
        for sink in self.sinks:
            self.counts.bytes_written += sink.write(finished)
        self.batch = {}
        self.written += [one.key for one in finished]
        self.counts.vision_bytes += sum(_vision_bytes(one.cache) for one in finished)
        self.counts.computed += len(finished)
        self.counts.images += len(finished)
        self._tick()

    def _name(self, entry: NameEntry) -> None:
        self.new_names.append(entry)
        if len(self.new_names) >= _NAMES_AT_ONCE:
            self._write_names()

    def _write_names(self) -> None:
        for sink in self.sinks:
            sink.name(self.new_names)
        self.new_names = []

    def _leave_out(self, name: str, reason: str) -> None:
        if not self.skip:
            raise BadImageError(reason)
        self.left_out.append({"image": name, "reason": reason})
        self.counts.skipped += 1
        self.counts.images += 1
        if self.refused is not None:
            self.refused(name, reason)
        self._tick()

    def _hit(self) -> None:
        self.counts.hits += 1
        self.counts.images += 1
        self._tick()

    def _tick(self) -> None:
        if self.progress is not None:
            self.progress(self.counts)


def _vision_bytes(cache: VoCoCache) -> int:
    return sum(block.nbytes // block.num_tokens * block.num_vision for block in cache)
