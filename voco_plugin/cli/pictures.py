"""``voco pictures``: write the set of named pictures that vendors draw differently."""

from __future__ import annotations

import argparse
from typing import Any

from . import output

KEYWORDS = {"num_questions": "--questions"}
"""Options that the package calls otherwise."""


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The options that name the packages of drawings."""
    parser.add_argument(
        "--draw",
        action="append",
        required=True,
        metavar="LABEL=FOLDER",
        help="an unpacked npm package of drawings to train on; several: each picture is of any that draws "
        "the thing (emoji-datasource-google, -twitter; @iconify-json/fluent-emoji-flat …)",
    )
    parser.add_argument(
        "--unseen",
        required=True,
        metavar="LABEL=FOLDER",
        help="the package whose drawings training never shows, openmoji say (SVG: pip install resvg-py)",
    )


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "pictures",
        parents=[common],
        help="write a set of named pictures that vendors draw differently",
        description="Write scenes of one to nine named drawings with questions and exact answers, as LLaVA "
        "JSON and as\na datasets folder. The drawings come from npm packages that you unpack; three test "
        "files ask\nabout new scenes, about an unseen vendor's drawings, and about unseen names.",
        epilog="example:\n  voco pictures runs/pictures --draw google=PKG --draw twitter=PKG "
        "--unseen openmoji=PKG\n"
        "where each PKG is an unpacked package:\n"
        "  npm pack emoji-datasource-google      (-twitter; openmoji; @iconify-json/…)\n"
        "  mkdir google && tar xzf emoji-datasource-google-*.tgz -C google --strip-components=1\n",
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    add_sources(parser)
    parser.add_argument("--num-train", type=int, default=12_000, help="training images (%(default)s)")
    parser.add_argument(
        "--num-test", type=int, default=300, help="images of each of the three test splits (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same set (%(default)s)")
    parser.add_argument("--questions", type=int, default=7, help="questions an image (%(default)s)")
    parser.add_argument(
        "--caption",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end a training conversation with a description of the picture (default: yes)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier set in OUT")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    from ..gridworld.pictures.picture_dataset import open_sources, write_pictures

    sources = open_sources(args.draw, args.unseen)
    meta = write_pictures(
        args.out,
        sources,
        num_train=args.num_train,
        num_test=args.num_test,
        seed=args.seed,
        num_questions=args.questions,
        caption=args.caption,
        overwrite=args.overwrite,
    )
    if args.json:
        output.emit_json({"out": args.out, **meta})
        return 0
    output.emit(f"{args.out}: {args.num_train} training and 3 x {args.num_test} held-out images")
    output.emit(f"{len(meta['names'])} names, {len(meta['held_out_names'])} held out")
    output.emit(sources.counted())
    if sources.missing:
        output.emit(f"left out, since no vendor of --draw draws them: {', '.join(sources.missing)}")
    blind = meta["blind_accuracy"]
    said = ", ".join(f"{split} {100 * figures['all']:.1f} %" for split, figures in blind.items())
    output.emit(f"a guesser who sees no image gets {said} of the questions right")
    return 0
