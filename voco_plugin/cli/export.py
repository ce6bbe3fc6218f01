"""``voco export``: a checkpoint's language model as an engine loads it, and what it has to know of blocks."""

from __future__ import annotations

import argparse
from typing import Any

from . import output


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "export",
        parents=[common],
        help="write a checkpoint's language model for an engine (vLLM, continuous batching)",
        description="Write the language model of a VoCo checkpoint alone, as an ordinary ...ForCausalLM "
        "folder (an adapter\nmerged), with its tokenizer and voco_engine.json, which says whose blocks it "
        "reads and how they move.\nImages are compressed by the checkpoint itself (voco compress --store). "
        "OUT appears when it is whole.",
        epilog="examples:\n  voco export runs/gridworld_voco runs/gridworld_engine\n"
        "  voco export runs/voco_lora runs/engine --dtype bfloat16\n",
    )
    parser.add_argument("source", metavar="CHECKPOINT", help="the folder of a VoCo checkpoint, or its hub id")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights written; blocks are those of a store made in it (default: the checkpoint's)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from ..cache.engine_file import EngineFile
    from ..serving.export import export_text_model

    made = export_text_model(args.source, args.out, dtype=args.dtype)
    file = EngineFile.read(made)
    size = sum(part.stat().st_size for part in made.rglob("*") if part.is_file())
    if args.json:
        output.emit_json(
            {"exported": str(made), "bytes": size, "voco_id": file.voco_id, "num_tokens": file.num_tokens,
             "dtype": file.dtype, "max_positions": file.max_positions}
        )  # fmt: skip
    else:
        output.emit(
            f"{made}: the language model of {args.source}, {size / 1e6:,.0f} MB, {file.dtype}, "
            f"{file.max_positions:,} positions, <voco> at {file.voco_id}"
        )
    return 0
