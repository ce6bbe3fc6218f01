"""Images → caches as a Ray Data job: workers that load the model once and take parcels of images.

Ray hands out the numbers of the images, not the images: each worker opens the source itself and reads only
what it was given. A parcel is finished when its caches are committed. The parcels of a worker that dies go to
another, which finds what was committed and computes the rest: caches are stored by content, so every image
ends in the store exactly once.

A store is a folder of one machine; on a cluster of several give shards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from voco_plugin.store.bulk import Counts

_PARCELS_PER_WORKER = 16
_PARCEL_BATCHES = 32
_MOST_PARCELS = 20_000
_USER_ERRORS = (ValueError, OSError, ImportError)


def compress_with_ray(
    model: str,
    source: Any,
    store: str | None = None,
    *,
    shards: str | None = None,
    workers: int = 1,
    num_tokens: int | None = None,
    batch_size: int = 8,
    max_memory: int | None = None,
    on_bad_sample: str = "raise",
    threads: int = 2,
    dtype: str | None = None,
    device: str | None = None,
    plugins: Sequence[str] = (),
    max_bytes: int | None = None,
    values: str | None = None,
    progress: Callable[[Counts], Any] | None = None,
    refused: Callable[[str, str], Any] | None = None,
) -> dict[str, Any]:
    """Compress every image of ``source``; the arguments are those of ``compress_dataset``, but for:

    Args:
        model: path or hub id; each worker loads it.
        source: an ``ImageSource`` with random access whose files every worker sees under the same path.
        store: folder of a store on this machine.
        workers: how many; each takes a GPU where the model goes on one, else a CPU.
        dtype, device, plugins: how to load the model (see ``voco compress --help``).
        max_bytes, values: of the store, as ``VoCoCacheStore`` takes them.

    Returns:
        as ``compress_dataset``, summed over the parcels, and ``workers``. What a worker had committed before
        it died counts as hits of the one that took over.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the source is a stream, the cluster cannot hold the workers, or a store is asked for on
            several machines.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError("--engine ray needs Ray: pip install 'voco_plugin[ray]'.") from None
    if not source.random_access:
        raise ValueError(
            "--engine ray needs images it can take by number; this source is read in order (compressed or "
            "remote tar, streaming). Use uncompressed local tars or tables, or --engine local."
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray prints what befalls workers
        if ours:
            stack.callback(ray.shutdown)
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False, **_cluster(workers))
        machines = sum(node["Alive"] for node in ray.nodes())
        if store is not None and machines > 1:
            raise ValueError(
                f"a store is a folder of one machine, and this Ray cluster has {machines}: give --shards URL."
            )
        on_gpu = device is None and ray.cluster_resources().get("GPU", 0) >= 1 or "cuda" in str(device)
        _check_room(ray, workers, on_gpu)
        options = {
            "num_tokens": num_tokens, "batch_size": batch_size, "max_memory": max_memory,
            "on_bad_sample": on_bad_sample, "threads": threads, "shards": shards,
        }  # fmt: skip
        loading = {"dtype": dtype, "device": device or ("cuda" if on_gpu else "cpu")}
        given = (model, loading, list(plugins), source, store, {"max_bytes": max_bytes, "values": values})
        return _run(ray, workers, on_gpu, len(source), (given, options), progress, refused)


class Worker:
    """A Ray Data actor: the model, the source and the store, and parcels of image numbers.

    Args:
        given: model, how to load it, plugin files, source, store and its options.
        options: of ``compress_dataset``.
    """

    def __init__(self, given: tuple, options: dict[str, Any]) -> None:
        self.options, self.problem = options, ""
        try:
            self._load(*given)
        except _USER_ERRORS as problem:  # raised here, Ray would start the worker again and again
            self.problem = str(problem)

    def _load(
        self, model: str, loading: dict[str, Any], plugins: Sequence[str], source: Any, store: str | None,
        store_options: dict[str, Any],
    ) -> None:  # fmt: skip
        import voco_plugin as vp
        from voco_plugin.registry import load_plugin

        for file in plugins:
            load_plugin(file)
        self.source = source
        self.model, self.processor = vp.load(model, **loading)
        self.store = None
        if store is not None:
            self.store = vp.VoCoCacheStore.for_model(store, self.model, **store_options)

    def __call__(self, parcel: dict[str, Any]) -> dict[str, list[Any]]:
        """The images of a parcel; shards are written when it ends, as Ray will not ask for it again. What a
        user can mend is reported, not raised: Ray would wrap it in three tracebacks.
        """
        from voco_plugin.store.bulk import compress_dataset
        from voco_plugin.store.sources.image_items import PickedImages

        if self.problem:
            return {"report": [json.dumps({"error": self.problem})]}
        picked = PickedImages(self.source, range(int(parcel["first"][0]), int(parcel["last"][0])))
        try:
            report = compress_dataset(self.model, self.processor, picked, self.store, **self.options)
        except _USER_ERRORS as problem:
            report = {"error": str(problem)}
        return {"report": [json.dumps(report)]}


def _run(
    ray: Any, workers: int, on_gpu: bool, total: int, given: tuple, progress: Any, refused: Any
) -> dict[str, Any]:
    """The job; counts are summed as parcels end."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller's bar knows hits and bytes
    batch = given[1]["batch_size"]
    # large enough to be worth sending and to make shards of a useful size, small enough to be shared out
    size = max(batch, min(batch * _PARCEL_BATCHES, -(-total // (workers * _PARCELS_PER_WORKER))))
    size = max(size, -(-total // _MOST_PARCELS))
    # rows that are there already: a dataset that is read (ray.data.range) would ask for a CPU of its own, and
    # wait for ever where the workers have them all
    parcels = [{"first": first, "last": min(first + size, total)} for first in range(0, total, size)]
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker need not find this file
    reports = ray.data.from_items(parcels, override_num_blocks=len(parcels)).map_batches(
        Worker, fn_constructor_args=given, batch_size=1, num_cpus=None if on_gpu else 1,
        num_gpus=1 if on_gpu else None, compute=ray.data.ActorPoolStrategy(size=workers),
    )  # fmt: skip
    start, counts = time.perf_counter(), Counts()
    left_out: list[dict[str, str]] = []
    evicted = 0
    for row in reports.iter_rows():
        report = json.loads(row["report"])
        if "error" in report:
            raise ValueError(report["error"])
        for field in fields(counts):
            setattr(counts, field.name, getattr(counts, field.name) + report[field.name])
        evicted += report["evicted"]
        left_out += report["skipped_images"]
        for one in report["skipped_images"] if refused is not None else ():
            refused(one["image"], one["reason"])
        if progress is not None:
            progress(counts)
    seconds = time.perf_counter() - start
    return {
        **{field.name: getattr(counts, field.name) for field in fields(counts)}, "seconds": seconds,
        "images_per_second": counts.images / max(seconds, 1e-9), "skipped_images": left_out,
        "evicted": evicted, "workers": workers,
    }  # fmt: skip


def _cluster(workers: int) -> dict[str, Any]:
    """Options of a Ray of our own; one that RAY_ADDRESS names has its own."""
    import os

    if os.environ.get("RAY_ADDRESS"):
        return {}
    # numbers and counts are all that goes through Ray's memory
    return {"num_cpus": max(workers, os.cpu_count() or 1), "object_store_memory": 128 << 20}


def _check_room(ray: Any, workers: int, on_gpu: bool) -> None:
    """Raises where Ray would wait for room that never comes."""
    kind = "GPU" if on_gpu else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if workers > there:
        raise ValueError(f"--workers {workers} need a {kind} each, and this Ray has {there}: give fewer.")
