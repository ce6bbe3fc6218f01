"""``voco generate --video``: a video file, folder or camera, or blocks of one that was compressed before."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import output
from .inputs import load_model, positive

if TYPE_CHECKING:
    from ..cache import VoCoCache

_READING = ("fps", "frames", "scene", "start", "end", "max_frames", "rate")
_OPTIONS = (*_READING, "frames_per_block", "frames_as", "time_text", "budget", "policy")
_OF_BLOCKS = ("fps", "time_text", "budget", "policy")


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """What says which frames of a video are seen, and which of them are kept."""
    group = parser.add_argument_group("video", "of --video, and of --cache with --together (blocks in order)")
    group.add_argument("--fps", type=float, metavar="F", help="frames a second (of blocks: 1)")
    group.add_argument("--frames", "--count", type=positive, metavar="N", help="N frames, evenly over it")
    group.add_argument("--scene", type=float, metavar="D", help="a frame where the picture changes by D")
    group.add_argument("--start", type=float, metavar="SECONDS", help="from here on")
    group.add_argument("--end", type=float, metavar="SECONDS", help="up to here; this ends a camera")
    group.add_argument("--max-frames", type=positive, metavar="N", help="stop after N frames")
    group.add_argument("--rate", type=float, metavar="F", help="frames a second of a folder of frames (1)")
    group.add_argument("--frames-per-block", type=positive, metavar="N", help="frames of one block (1)")
    group.add_argument(
        "--frames-as", choices=("auto", "image", "video"), help="what the processor gets a block as (auto)"
    )
    group.add_argument("--time-text", action="store_true", default=None, help="write <12.0s> before a block")
    group.add_argument("--budget", metavar="N|SIZE", help="keep at most N blocks, or 64MB of them")
    group.add_argument(
        "--policy", choices=("uniform", "merge", "average", "window"), help="what goes beyond the budget"
    )


def is_video(args: argparse.Namespace) -> bool:
    """Whether a video is asked about: a source, or a cache whose blocks are read as one.

    Raises:
        ValueError: options of a video without one.
    """
    given = [name for name in _OPTIONS if getattr(args, name) is not None]
    if args.video is not None:
        for name in ("index", "together"):
            if getattr(args, name):
                raise ValueError(f"--{name} is of images and caches; leave it out with --video.")
        unused = [name for name in given if name in _OPTIONS[:-3]] if args.store else []
        if unused:
            raise ValueError(
                f"--{unused[0].replace('_', '-')} says how a file is read, and a store holds the frames that "
                "were chosen when it was compressed; leave it out."
            )
        return True
    blocks = bool(args.cache and args.together)
    wrong = [name for name in given if not (blocks and name in _OF_BLOCKS)]
    if wrong:
        raise ValueError(
            f"--{wrong[0].replace('_', '-')} is of a video: give --video FILE"
            + (", or --cache FILE --together." if wrong[0] in _OF_BLOCKS else ".")
        )
    return blocks and bool(given)


def run_video(args: argparse.Namespace, questions: list[str], caches: list[Any], name: str) -> int:
    """Read the video once, then ask every question alone about what is kept.

    Args:
        caches: of ``--cache``: its blocks in order.
        name: what the result calls the video.
    """
    if args.num_beams > 1:
        raise ValueError("--num-beams is not for a video; leave it out.")
    source: Any = None if args.store or caches else _source(args.video)
    from ..inference.streaming.budget import check_policy, parse_budget

    check_policy(args.policy, args.budget)  # before the model loads
    parse_budget(args.budget)
    model, processor = load_model(args)

    from ..inference.session import VoCoSession

    reading = (
        {} if source is None else {("count" if n == "frames" else n): getattr(args, n) for n in _READING}
    )
    start = time.perf_counter()
    with output.progress(total=args.frames or len(caches) or None, unit="frame", quiet=args.json) as bar:
        watching = VoCoSession(model, processor, num_tokens=args.num_tokens).watch(
            source, time_text=bool(args.time_text), budget=args.budget, policy=args.policy,
            frames_per_block=args.frames_per_block or 1, frames_as=args.frames_as or "auto",
            batch_size=args.batch_size, tick=bar.update, **reading,
        )  # fmt: skip
        if source is not None:
            watching.run()
        else:
            for cache, at in _stored(args, model) if args.store else _timed(caches, args.fps or 1.0):
                watching.add(cache.to(model.device), at)
                bar.update(1)
    if not watching.blocks_seen:
        raise ValueError(
            f"{name} gives no frame under these options; widen --start, --end, --fps or --frames."
        )
    seconds = time.perf_counter() - start
    with output.progress(total=len(questions), unit="answer", quiet=args.json) as bar:
        answers = []
        for question in questions:
            answers.append(watching.ask(question, remember=False, max_new_tokens=args.max_new_tokens))
            bar.update(1)
    report = watching.report()
    if args.json:
        asked = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
        output.emit_json({"video": name, **report, "seconds": seconds, "answers": asked})
        return 0
    output.emit(f"{name}: {report['text']}")
    for question, text in zip(questions, answers, strict=True):
        output.emit(f"  {question}\n    {text}")
    return 0


def _source(given: str) -> Any:
    """A path, a URL, or the number of a camera."""
    if given.isdigit() and not Path(given).exists():
        return int(given)
    if "://" not in given and not Path(given).expanduser().exists():
        raise FileNotFoundError(f"video {given} does not exist.")
    return given if "://" in given else str(Path(given).expanduser())


def _timed(caches: list[Any], fps: float) -> Iterator[tuple[VoCoCache, float]]:
    if not fps > 0:
        raise ValueError(f"--fps {fps} must be more than 0.")
    for number, cache in enumerate(caches):
        yield cache, number / fps


def _stored(args: argparse.Namespace, model: Any) -> Iterator[tuple[VoCoCache, float]]:
    """The blocks of a video that ``voco compress --store`` has put into a store, by its name."""
    from ..config import nearest
    from ..store.names import caches_by_name
    from ..store.store import VoCoCacheStore
    from ..store.video_series import all_series, read_series

    with VoCoCacheStore.for_model(args.store, model, readonly=True) as store:
        tokens = args.num_tokens if args.num_tokens is not None else store.fingerprint["num_tokens"]
        series = read_series(args.store, args.video, tokens)
        if series is None:
            known = {s.name for s in all_series(args.store) if s.num_tokens == tokens}
            raise ValueError(
                f"store {args.store} has no video {args.video!r} with K={tokens}"
                f"{nearest(args.video, known)}: voco compress {args.model} {args.video} --store {args.store}"
            )
        if series.broken:
            output.note(f"{args.video} ends before its end: {series.broken}")
        for frame, at in zip(series.frames, series.times, strict=True):
            yield caches_by_name(store, [frame], tokens)[0], at
