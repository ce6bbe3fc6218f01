"""``voco gridworld``: write the synthetic visual question answering set and, asked for, the tiny VLM."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import gridworld_video, output
from .preconditions import check_packages

NUM_TRAIN, NUM_TEST = 8000, 500
KEYWORDS = {
    "num_colors": "--colors", "num_questions": "--questions", "num_frames": "--frames",
    "times": "--time-text",
}  # fmt: skip
"""Options that the package calls otherwise."""
_EXTRAS = "'voco_plugin[backbones]'"


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "gridworld",
        parents=[common],
        help="write a small visual question answering set",
        description="Write gridworld: scenes of coloured shapes and real handwritten digits, with exact "
        "answers, as\n"
        "LLaVA JSON and as a datasets folder; with --base, also a tiny VLM trained on it; with --model, "
        "one with a pre-trained tower, to train.\nWith --video, videos in the place of images.",
        epilog="examples:\n  voco gridworld runs/gridworld --base runs/gridworld_base\n"
        "  voco gridworld runs/gridworld --num-train 2000 --model runs/gridworld_init\n"
        "  voco gridworld runs/study --level study --num-train 16000 --model runs/study_init\n"
        "  voco gridworld runs/videos --video --frames 8,16 --num-train 2000\n"
        "  voco gridworld runs/needle --video --plot needle --frames 64,1024 --num-train 16 --no-hf\n",
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--num-train", type=int, help="training images (default: 8000; videos: 2000)")
    parser.add_argument("--num-test", type=int, help="held-out images (default: 500; videos: 200)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    parser.add_argument(
        "--level",
        default="quickstart",
        choices=("quickstart", "study", "large"),
        help="how hard: quickstart (2 x 2 cells, answers in phrases), study (2 x 2 cells, six colours, "
        "answers of one word) or large (3 x 3 cells of these); options below change it (%(default)s)",
    )
    parser.add_argument("--grid", type=int, help="cells a side, 2…9 (default: 2; large: 3)")
    parser.add_argument("--colors", type=int, help="colours in use, 2…6 (default: 4; study and large: 6)")
    parser.add_argument("--questions", type=int, help="questions an image (default: 8; study: 6; large: 12)")
    parser.add_argument("--cell-pixels", type=int, help="pixels a cell's side (default: 32; else 16)")
    parser.add_argument(
        "--question-set",
        choices=("phrases", "words", "terse"),
        help="phrases, or answers of one word: words, terse (default: phrases; study and large: terse)",
    )
    parser.add_argument(
        "--caption",
        action=argparse.BooleanOptionalAction,
        help="end a training conversation with a description of every cell (default: yes)",
    )
    parser.add_argument(
        "--boxes",
        action="store_true",
        help="also ask where an object is and what is in a box, boxes as text: types rec and reg",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier gridworld in OUT")
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help="also copy the level's shipped base VLM (quickstart, study) to FOLDER",
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="also write the tiny VLM, tower pre-trained, projector aligned"
    )
    parser.add_argument(
        "--parts", metavar="FOLDER", help="also write tiny encoders and LLMs to compose from (minutes)"
    )
    parser.add_argument("--model-seed", type=int, default=0, help="seed of its weights (default: 0)")
    parser.add_argument("--tower-steps", type=int, help="steps of the tower's pre-training")
    parser.add_argument("--align-steps", type=int, help="steps of the projector's alignment")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    gridworld_video.add_options(parser)


def run(args: argparse.Namespace) -> int:
    gridworld_video.check(args)
    check_packages({"sklearn": "'voco_plugin[quickstart]'"}, "voco gridworld")  # its digits
    if args.parts:
        check_packages({"timm": _EXTRAS, "open_clip": _EXTRAS}, f"--parts {args.parts}")
    if args.video:
        return gridworld_video.run(args)
    from ..gridworld.dataset import write_gridworld

    args.num_train = NUM_TRAIN if args.num_train is None else args.num_train
    args.num_test = NUM_TEST if args.num_test is None else args.num_test
    if args.base:
        check_target(args.base, args.overwrite, args.level)
    meta = write_gridworld(
        args.out,
        num_train=args.num_train,
        num_test=args.num_test,
        seed=args.seed,
        level=args.level,
        grid=args.grid,
        num_colors=args.colors,
        num_questions=args.questions,
        cell_pixels=args.cell_pixels,
        question_set=args.question_set,
        caption=args.caption,
        boxes=args.boxes,
        overwrite=args.overwrite,
    )
    result: dict[str, Any] = {"out": args.out, **meta}
    if args.base:
        result["base"] = args.base
        copy_base(args.base, args.level)
    if args.model:
        result["model"] = args.model
        result["pre-trained"] = _write_model(args, meta["settings"])
    if args.parts:
        from ..gridworld.tiny_parts import write_tiny_parts

        more = {} if args.tower_steps is None else {"tower_steps": args.tower_steps}
        world = _world(args, meta["settings"])
        result["parts"] = {args.parts: write_tiny_parts(args.parts, seed=args.model_seed, **world, **more)}
    if args.json:
        output.emit_json(result)
        return 0
    output.emit(f"{args.out}: {args.num_train} training and {args.num_test} held-out images")
    blind = meta["blind_accuracy"]
    output.emit(
        f"a guesser who sees no image gets {100 * blind['all']:.1f} % of the held-out questions right"
    )
    if args.base:
        output.emit(f"{args.base}: the shipped base VLM")
    if args.parts:
        output.emit(f"{args.parts}: tiny encoders and LLMs, {result['parts'][args.parts]}")
    if args.model:
        output.emit(f"{args.model}: tiny VLM, {result['pre-trained']}")
    return 0


SHIPPED = {"quickstart": "gridworld_base", "study": "gridworld_study_base"}
"""The base VLMs that come with the package, by level: each is named as the recipe that made it."""


def shipped_base(level: str = "quickstart") -> Path:
    """The folder in the package with a level's base VLM; `copy_base` unpacks its weights.

    Raises:
        ValueError: there is none for that level.
        FileNotFoundError: this installation has it not.
    """
    if level not in SHIPPED:
        raise ValueError(f"no base VLM is shipped for level {level!r}: train one, --model FOLDER starts it.")
    folder = Path(__file__).resolve().parents[1] / "gridworld" / "assets" / SHIPPED[level]
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the shipped base VLM is not at {folder}; train one: voco gridworld DATA --level {level} "
            f"--model INIT, then voco train {SHIPPED[level]}."
        )
    return folder


def check_target(folder: str, overwrite: bool, level: str = "quickstart") -> None:
    """Refuse to write the base over something else."""
    target = Path(folder)
    if target.exists() and any(target.iterdir()) and not (overwrite and (target / "config.json").is_file()):
        raise ValueError(f"--base {folder} is not empty; give another folder (or --overwrite, over a model).")
    shipped_base(level)


def copy_base(folder: str, level: str = "quickstart") -> None:
    """Copy a level's base VLM to ``folder``: an ordinary checkpoint, weights in fp32."""
    from ..gridworld.shipped_weights import unpack_folder

    unpack_folder(shipped_base(level), folder)


def _world(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What a tiny model must know of the set that was written."""
    from ..gridworld.levels import level_of

    names = ("grid", "num_colors", "cell_pixels", "question_set", "boxes")
    return {name: settings[name] for name in names} | {"patch_size": level_of(args.level).patch_size}


def _write_model(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    from ..gridworld.tiny_vlm import write_tiny_vlm

    given = {"tower_steps": args.tower_steps, "align_steps": args.align_steps}
    steps = {name: number for name, number in given.items() if number is not None}
    return write_tiny_vlm(args.model, seed=args.model_seed, **_world(args, settings), **steps)
