"""The options that make frames of videos: which frames, and how many make a block."""

from __future__ import annotations

import argparse
from typing import Any

from .inputs import positive

_SAMPLING = ("fps", "count", "scene", "start", "end", "max_frames")
_NEEDS = "is of videos: give --fps, --count, --scene or --every-frame."


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """``--fps``, ``--count``, ``--scene``, ``--every-frame`` and what goes with them."""
    group = parser.add_argument_group(
        "videos",
        "With one of --fps, --count, --scene and --every-frame every DATASET is a video: a file, an animated "
        "image, or a folder of either frames or videos.",
    )
    group.add_argument("--fps", type=float, metavar="N", help="N frames a second")
    group.add_argument("--count", type=positive, metavar="N", help="N frames, evenly over the video")
    group.add_argument(
        "--scene", type=float, metavar="D", help="a frame where the picture changes by D (0 to 1; cuts: 0.1)"
    )
    group.add_argument("--every-frame", action="store_true", help="all frames")
    group.add_argument("--start", type=float, metavar="SECONDS", help="from here on")
    group.add_argument("--end", type=float, metavar="SECONDS", help="up to here")
    group.add_argument("--max-frames", type=positive, metavar="N", help="stop after N frames of a video")
    group.add_argument("--rate", type=float, metavar="N", help="frames a second of a folder of frames (1)")
    group.add_argument(
        "--frames-per-block", type=positive, default=1, metavar="N", help="frames that share VoCo tokens (1)"
    )


def video_options(args: argparse.Namespace) -> Any:
    """The ``VideoOptions`` of the command line; ``None`` where no frames are asked for.

    Raises:
        ValueError: options that need a way to pick frames, or a block of several frames.
    """
    picked = args.every_frame or any(getattr(args, name) is not None for name in ("fps", "count", "scene"))
    if not picked:
        for name in ("start", "end", "max_frames", "rate"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {_NEEDS}")
        if args.frames_per_block != 1:
            raise ValueError(f"--frames-per-block {_NEEDS}")
        return None
    if args.every_frame and (args.fps, args.count, args.scene) != (None, None, None):
        raise ValueError("--every-frame takes all frames: leave out --fps, --count and --scene.")
    if args.frames_per_block != 1:
        raise ValueError(
            f"--frames-per-block {args.frames_per_block}: frames that a model reads as images are a block "
            "each, since a block ends where the next image begins; give 1."
        )
    from ..store.sources.video_sources import VideoOptions
    from ..video import Sampling

    return VideoOptions(Sampling(**{name: getattr(args, name) for name in _SAMPLING}), args.rate)


def check_no_video(names: list[str]) -> None:
    """Raises where a video is named and nothing says which of its frames are meant."""
    from ..video.decoding import VIDEO_SUFFIXES

    for name in names:
        if name.lower().endswith(VIDEO_SUFFIXES):
            raise ValueError(
                f"{name} is a video: say which frames (--fps 1, --count 64, --scene 0.1 or --every-frame)."
            )
