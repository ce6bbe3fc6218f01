"""``voco gridworld --video``: write videos in the place of images."""

from __future__ import annotations

import argparse
from typing import Any

from . import output

_IMAGES_ONLY = {
    "level": "quickstart", "grid": None, "question_set": None, "caption": None, "boxes": False, "base": None,
    "parts": None,
}  # fmt: skip
_VIDEO_ONLY = ("frames", "plot", "seconds", "time_text", "pool", "hf")


def counts(text: str) -> tuple[int, ...]:
    """``8,16`` as numbers of frames, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; write 8 or 8,16,32") from None


def add_options(parser: argparse.ArgumentParser) -> None:
    """What only videos take."""
    group = parser.add_argument_group("videos")
    group.add_argument(
        "--video",
        action="store_true",
        help="write short videos, 2 x 2 cells a frame, whose questions need time (docs/video_evaluation.md)",
    )
    group.add_argument(
        "--frames", type=counts, metavar="N[,N…]", help="frames a video; of several each in turn (default: 8)"
    )
    group.add_argument(
        "--plot",
        choices=("story", "needle"),
        help="story: things move, come and go; needle: one frame holds a digit, no other does (default: "
        "story)",
    )
    group.add_argument("--seconds", type=float, help="from one frame to the next (default: 1.0)")
    group.add_argument(
        "--time-text",
        action=argparse.BooleanOptionalAction,
        help="write each frame's time before it, as <1.0s> (default: yes)",
    )
    group.add_argument(
        "--pool", type=int, help="pictures that the needle videos of a split share (default: 256)"
    )
    group.add_argument(
        "--hf",
        action=argparse.BooleanOptionalAction,
        help="also write the datasets folder, in which each frame is stored anew (default: yes)",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options of the other kind of set.

    Raises:
        ValueError: the option is named.
    """
    if args.video:
        given = [name for name, default in _IMAGES_ONLY.items() if getattr(args, name) != default]
        reason = "goes with images, not with --video"
    else:
        given = [name for name in _VIDEO_ONLY if getattr(args, name) is not None]
        reason = "goes with --video"
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} {reason}; leave one of the two out.")


def run(args: argparse.Namespace) -> int:
    from ..gridworld.video_dataset import VideoWorld, write_gridworld_video

    given = {
        "num_train": args.num_train, "num_test": args.num_test, "seed": args.seed, "num_frames": args.frames,
        "plot": args.plot, "num_questions": args.questions, "num_colors": args.colors,
        "cell_pixels": args.cell_pixels, "seconds": args.seconds, "times": args.time_text, "pool": args.pool,
        "hf": args.hf,
    }  # fmt: skip
    world = VideoWorld(**{name: value for name, value in given.items() if value is not None})
    meta = write_gridworld_video(args.out, world, overwrite=args.overwrite)
    result: dict[str, Any] = {"out": args.out, **meta}
    if args.model:
        result["model"] = args.model
        result["pre-trained"] = _write_model(args, world)
    if args.json:
        output.emit_json(result)
        return 0
    output.emit(f"{args.out}: {world.num_train} training and {world.num_test} held-out videos")
    who = {
        "blind_accuracy": "no frame", "single_frame_accuracy": "the middle frame",
        "shuffled_accuracy": "shuffled frames",
    }  # fmt: skip
    kinds = list(meta["blind_accuracy"])
    lines = [[name, *(100 * meta[key][kind] for kind in kinds)] for key, name in who.items()]
    output.emit("right answers, in per cent, of the best guesser who sees")
    output.emit(output.table(lines, ("", *kinds)))
    if args.model:
        output.emit(f"{args.model}: tiny VLM, {result['pre-trained']}")
    return 0


def _write_model(args: argparse.Namespace, world: Any) -> Any:
    """The tiny VLM of the image world with 2 x 2 cells, with the words of videos."""
    from ..gridworld.tiny_vlm import write_tiny_vlm
    from ..gridworld.video_scenes import GRID

    given = {"tower_steps": args.tower_steps, "align_steps": args.align_steps}
    steps = {name: number for name, number in given.items() if number is not None}
    return write_tiny_vlm(
        args.model, grid=GRID, num_colors=world.num_colors, cell_pixels=world.cell_pixels, patch_size=8,
        question_set="terse", video=True, seed=args.model_seed, **steps,
    )  # fmt: skip
