"""What ``voco eval`` adds for videos: frame orders, the published question sets, a judge."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..evaluation.frame_order import FRAMES, check_frames
from . import output
from .inputs import positive


def orders(text: str) -> list[str]:
    """``all,single,shuffled`` as a list, for argparse."""
    try:
        return list(dict.fromkeys(check_frames(part.strip()) for part in text.split(",")))
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def fps(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("videos (docs/video_evaluation.md)")
    group.add_argument(
        "--frames",
        type=orders,
        default=["all"],
        metavar="all|single|shuffled[,…]",
        help="; ".join(f"{name}: {text}" for name, text in FRAMES.items()) + " (default: all)",
    )
    group.add_argument("--shuffle-seed", type=int, default=0, help="of shuffled (default: %(default)s)")
    group.add_argument(
        "--video-qa",
        choices=("msvd", "msrvtt", "activitynet"),
        help="--data is an annotation file of that set (test_qa.json, test_q.json); needs --videos",
    )
    group.add_argument("--videos", metavar="FOLDER", help="its video files")
    group.add_argument(
        "--answers", metavar="FILE", help="of activitynet (default: test_a.json of test_q.json)"
    )
    group.add_argument("--mapping", metavar="FILE", help="of msvd: youtube_mapping.txt")
    rate = group.add_mutually_exclusive_group()
    rate.add_argument("--num-frames", type=positive, help="frames of each video, evenly spaced (default: 8)")
    rate.add_argument("--fps", type=fps, help="frames a second instead")
    group.add_argument("--time-text", action="store_true", help="write each frame's time before it, <1.0s>")
    judged = parser.add_argument_group("judge")
    judged.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint, http://host:8000/v1")
    judged.add_argument("--judge-model", metavar="NAME", help="what the endpoint calls its model")
    judged.add_argument(
        "--judge-cache",
        metavar="FILE",
        default="voco_judge.jsonl",
        help="verdicts so far, so that none is asked for twice (default: %(default)s)",
    )
    judged.add_argument(
        "--judge-timeout", type=fps, default=60.0, metavar="SECONDS", help="of a reply (default: %(default)s)"
    )
    judged.add_argument(
        "--judge-retries", type=int, default=4, metavar="N", help="of a request (default: %(default)s)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that mean nothing without another.

    Raises:
        ValueError: the options are named.
    """
    if args.video_qa is None:
        for name in ("videos", "answers", "mapping", "num_frames", "fps", "time_text"):
            if getattr(args, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} goes with --video-qa; name the set, or leave it."
                )
    elif args.videos is None:
        raise ValueError(f"--video-qa {args.video_qa} needs --videos FOLDER, where the set's videos are.")
    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("--judge URL and --judge-model NAME go together; give both.")
    if args.judge_retries < 0:
        raise ValueError(f"--judge-retries {args.judge_retries} is below 0; give 0 or more.")


def load_videos(args: argparse.Namespace, skip: bool) -> Any:
    """The rows of a published set; no video is opened yet."""
    from ..evaluation.video_qa import read_video_qa, video_rows
    from ..evaluation.video_rows import VideoDataset

    items = read_video_qa(args.data, args.video_qa, answers=args.answers, mapping=args.mapping)
    count = args.num_frames or (None if args.fps else 8)
    rows = video_rows(items, args.videos, missing=skip)
    return VideoDataset(rows, count=count, fps=args.fps, times=args.time_text)


def judge_of(args: argparse.Namespace) -> Any:
    """The judge asked for, or ``None``; its key is read from the environment.

    Raises:
        ValueError: the URL is none, or the cache file is none.
    """
    if args.judge is None:
        return None
    from ..evaluation.judge import KEY_VARIABLE, Judge

    return Judge(
        args.judge, args.judge_model, cache=args.judge_cache, key=os.environ.get(KEY_VARIABLE),
        timeout=args.judge_timeout, retries=args.judge_retries,
    )  # fmt: skip


def judged(judge: Any, questions: Any, answers: list[str], name: str, quiet: bool) -> dict[str, Any]:
    """The judge's summary of one mode's answers."""
    from ..evaluation.judge import summary

    with output.progress(total=len(questions), unit="answer", quiet=quiet) as bar:
        bar.set_description(f"judging {name}")
        verdicts = judge.judge(
            [q.text for q in questions], [q.answer for q in questions], answers, bar.update
        )
    found = summary(judge, verdicts, [q.type for q in questions])
    found["verdicts"] = [None if v is None else [int(v.right), v.score] for v in verdicts]
    return found


def numbers_table(scores: dict[str, Any], by: str) -> str:
    """Accuracy ``by`` number of ``frames`` or ``turn`` of the conversation, in per cent; empty where it was
    not told apart.
    """
    found = {name: entry[f"by_{by}"] for name, entry in scores.items() if f"by_{by}" in entry}
    if not found:
        return ""
    numbers = list(next(iter(found.values())))
    lines = [[name, *(100 * shares[number] for number in numbers)] for name, shares in found.items()]
    return output.table(lines, (by, *map(str, numbers)))


def judge_table(scores: dict[str, Any]) -> str:
    """The judge's word on each mode; empty without a judge."""
    entries = {name: entry["judge"] for name, entry in scores.items() if "judge" in entry}
    if not entries:
        return ""
    lines = [
        [name, 100 * e["accuracy"], e["score"], e["judged"], e["not_judged"]] for name, e in entries.items()
    ]
    return output.table(lines, ("judge", "right", "score", "judged", "not judged"))
