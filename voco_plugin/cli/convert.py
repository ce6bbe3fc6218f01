"""``voco convert``: a checkpoint of the original LLaVA-1.5 or VoCo-LLaMA code → this package's format."""

from __future__ import annotations

import argparse
from typing import Any

from . import output
from .inputs import positive


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "convert",
        parents=[common],
        help="convert a checkpoint of the original LLaVA-1.5 or VoCo-LLaMA code",
        description="Write an ordinary transformers LLaVA checkpoint with its processor, and a "
        "voco_config.json\nwhere the tokenizer has <voco>. OUT appears when it is whole; one weight file "
        "at a time is in memory.",
        epilog="examples:\n"
        "  voco convert checkpoints/voco_llama_ckpt voco-llama --num-tokens 2 --vision-tower clip-336/\n"
        "  voco convert llava-v1.5-7b-pretrain aligned --language-model vicuna-7b-v1.5\n",
    )
    parser.add_argument("source", metavar="SRC", help="a folder, or a hub id")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument(
        "--num-tokens",
        type=positive,
        metavar="K",
        help="VoCo tokens an image; the checkpoint does not say it (default: 1)",
    )
    parser.add_argument(
        "--vision-tower",
        metavar="PATH",
        help="folder or hub id of the CLIP (default: what config.json names)",
    )
    parser.add_argument(
        "--language-model", metavar="PATH", help="folder or hub id of the LLM of a projector saved alone"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights written (default: the language model's)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from ..models.official import convert_official

    made = convert_official(
        args.source,
        args.out,
        num_tokens=args.num_tokens,
        vision_tower=args.vision_tower,
        language_model=args.language_model,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        tick=None if args.json else lambda name: output.note(f"wrote {name}"),
    )
    result = {
        "folder": str(made.folder), "files": made.files, "image_token_id": made.image_token_id,
        "voco": made.voco.to_dict() if made.voco else None, "dtype": made.dtype, "notes": made.notes,
    }  # fmt: skip
    if args.json:
        output.emit_json(result)
        return 0
    for text in made.notes:
        output.note(f"note: {text}.")
    rule = "a plain LLaVA"
    if made.voco is not None:
        rule = f"VoCo, K = {made.voco.num_tokens}, <voco> at {made.voco.token_id}"
    output.emit(f"{args.out}: {rule}, {made.dtype}, <image> at {made.image_token_id}")
    return 0
