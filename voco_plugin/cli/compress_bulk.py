"""``voco compress --store DIR | --shards URL``: any number of images, one process or several, resumed."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..models.model_paths import check_model_path
from . import output
from .compress_options import check_bulk_options
from .video_options import check_no_video, video_options

OF_DATASETS = ("split", "image_column", "image_folder", "streaming")
COUNTED = (
    "images", "computed", "hits", "by_name", "skipped", "bytes_written", "vision_bytes", "evicted",
)  # fmt: skip


def run(args: argparse.Namespace, load_model: Callable[[argparse.Namespace], tuple[Any, Any]]) -> int:
    """The whole command; ``load_model`` loads the model that ``args`` name."""
    check_bulk_options(args)
    from ..store.bulk.processes import Processes

    here = Processes.of()
    if here.world > 1 and args.workers not in (None, here.world):
        raise ValueError(f"--workers {args.workers} in a launch of {here.world} processes: leave it out.")
    if args.engine == "ray" and here.world > 1:
        raise ValueError("--engine ray starts its own workers: run it by itself, not under a launcher.")
    check_model_path(args.model)
    source = open_source(args)
    if args.engine == "local" and (args.workers or 1) > 1 and here.world == 1:
        return launch(args.argv, args.workers)
    start = time.perf_counter()
    if args.engine == "ray":
        reports: list[dict[str, Any]] | None = [_run_ray(args, source)]
    else:
        here.join()
        try:
            reports = here.gather(_run_share(args, source, here, load_model))
        finally:
            here.leave()
    if reports is not None:
        _report(args, reports, time.perf_counter() - start)
    return 0


def open_source(args: argparse.Namespace) -> Any:
    """The images of the command line; what is not there is found before a model loads."""
    from ..store.sources.image_sources import image_source
    from ..store.sources.video_sources import video_source

    missing = args.on_bad_sample == "skip"
    videos = video_options(args)
    if videos is not None:
        for name in OF_DATASETS:
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} is not of videos: leave it out.")
        return video_source(args.images, videos, missing=missing)
    check_no_video(args.images)
    source = image_source(
        args.images, split=args.split, image_column=args.image_column, image_folder=args.image_folder,
        streaming=args.streaming, missing=missing,
    )  # fmt: skip
    if source.random_access and not len(source):
        raise ValueError(f"{' '.join(args.images)} holds no image.")
    return source


def open_store(args: argparse.Namespace, model: Any) -> Any:
    """The store of the command line, for this model; ``None`` where none is asked for."""
    if not args.store:
        return None
    from ..store.store import VoCoCacheStore

    values = "int8" if args.int8 else None
    return VoCoCacheStore.for_model(args.store, model, max_bytes=args.max_bytes, values=values)


def _run_share(args: argparse.Namespace, source: Any, here: Any, load_model: Any) -> dict[str, Any]:
    """This process's share of the images."""
    if here.world > 1 and args.device is None:
        import torch

        if torch.cuda.is_available():
            args.device = f"cuda:{here.local_rank % torch.cuda.device_count()}"
    model, processor = load_model(args)

    from ..store.bulk import compress_dataset

    store = open_store(args, model)
    try:
        with Bar(source.about(here.rank, here.world), quiet=args.json or not here.first) as bar:
            return compress_dataset(
                model, processor, source, store, shards=args.shards, num_tokens=args.num_tokens,
                batch_size=args.batch_size, max_memory=args.max_memory, on_bad_sample=args.on_bad_sample,
                threads=args.threads, rank=here.rank, world=here.world, progress=bar.show,
                refused=lambda _, reason: output.note(f"skipped: {reason}"),
            )  # fmt: skip
    finally:
        if store is not None:
            store.close()


def _run_ray(args: argparse.Namespace, source: Any) -> dict[str, Any]:
    from .accelerate_launch import load_integration

    bridge = load_integration("ray")
    with Bar(source.about(0, 1), quiet=args.json) as bar:
        return bridge.compress_with_ray(
            args.model, source, args.store, shards=args.shards, workers=args.workers or 1,
            num_tokens=args.num_tokens, batch_size=args.batch_size, max_memory=args.max_memory,
            on_bad_sample=args.on_bad_sample, threads=args.threads, dtype=args.dtype, device=args.device,
            plugins=args.plugin or [], max_bytes=args.max_bytes, values="int8" if args.int8 else None,
            progress=bar.show, refused=lambda _, reason: output.note(f"skipped: {reason}"),
        )  # fmt: skip


class Bar:
    """The progress bar: images/s and time left (tqdm's own), cache hits, bytes written."""

    def __init__(self, total: int | None, quiet: bool) -> None:
        self.bar = output.progress(total=total, unit="image", quiet=quiet)

    def show(self, counts: Any) -> None:
        """Bring it up to the counts."""
        written = output.human_bytes(counts.bytes_written)
        self.bar.set_postfix({"hits": counts.hits, "written": written}, refresh=False)
        self.bar.update(counts.images - self.bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()


def _report(args: argparse.Namespace, reports: Sequence[dict[str, Any]], seconds: float) -> None:
    """One report from all processes."""
    result: dict[str, Any] = {name: sum(report[name] for report in reports) for name in COUNTED}
    left_out = [one for report in reports for one in report["skipped_images"]]
    working = max(report["seconds"] for report in reports)
    result |= {
        "skipped_samples": result.pop("skipped"), "skipped": left_out,
        "processes": reports[0].get("workers", len(reports)), "seconds": seconds, "working_seconds": working,
        "images_per_second": result["images"] / max(working, 1e-9),
    }  # fmt: skip
    if not result["images"]:
        raise ValueError(f"{' '.join(args.images)} holds no image.")
    if not result["computed"] + result["hits"]:
        raise ValueError(f"none of the {result['images']} images can be used: {left_out[0]['reason']}")
    if args.store:
        from ..store.store import VoCoCacheStore

        with VoCoCacheStore(args.store, readonly=True) as store:
            found = store.stat()
        result["store"] = {k: found[k] for k in ("path", "records", "bytes", "max_bytes", "values")}
    if args.shards:
        from ..store.shards import ShardFolder, write_manifest

        listed = write_manifest(ShardFolder(args.shards))["shards"]
        size = sum(shard["bytes"] for shard in listed.values())
        result["shards"] = {"url": args.shards, "shards": len(listed), "bytes": size}
    if args.json:
        output.emit_json(result)
        return
    if left_out:
        output.emit(f"{len(left_out)} of {result['images']} images skipped (--on-bad-sample skip)")
    output.emit(
        f"{result['images']} image(s) in {working:.1f} s ({result['images_per_second']:.1f} images/s): "
        f"{result['computed']} computed, {result['hits']} there already or seen twice"
    )
    if result["bytes_written"]:
        words = output.size_words(result["vision_bytes"], result["bytes_written"], "all vision tokens'")
        ratio = f", {words}" if result["vision_bytes"] else ""
        output.emit(f"{output.human_bytes(result['bytes_written'])} of keys and values written{ratio}")
    for name in ("store", "shards"):
        if name in result:
            place = result[name]
            what = f"{place['records']} caches" if name == "store" else f"{place['shards']} shard(s)"
            output.emit(
                f"{name} {place.get('path') or place['url']}: {what}, {output.human_bytes(place['bytes'])}"
            )
    if result["evicted"]:
        output.note(
            f"{result['evicted']} of the caches made now were driven out again by the store's limit of "
            f"{output.human_bytes(result['store']['max_bytes'])}: raise --max-bytes to keep them."
        )


def launch(argv: Sequence[str], processes: int) -> int:
    """This command again in ``processes`` processes on this machine; returns the exit status of the first
    that failed, or 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "voco_plugin", *argv]
    started = [
        subprocess.Popen(command, env={**os.environ, **world, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(processes)
    ]
    try:
        while True:
            codes = [process.poll() for process in started]
            failed = [code for code in codes if code]
            if failed or all(code == 0 for code in codes):
                return abs(failed[0]) if failed else 0
            time.sleep(0.05)
    finally:  # without the one that failed the others would wait for its report
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait()
