"""``voco merge``: an adapter and its base → one ordinary checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from . import output


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "merge",
        parents=[common],
        help="merge an adapter into the model it was trained on",
        description="Write the model that an adapter makes of its base, weights merged, with its processor: "
        "an ordinary\ncheckpoint that loads without PEFT and that a new adapter can start from. OUT appears "
        "when it is whole.",
        epilog="examples:\n  voco merge runs/smollm2_gridworld_base runs/smollm2_gridworld_merged\n"
        "  voco merge runs/voco_lora runs/voco_merged --dtype bfloat16\n",
    )
    parser.add_argument("source", metavar="SRC", help="the folder of an adapter, or its hub id")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights written (default: the base's)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from ..models.merging import merge_adapter

    made = merge_adapter(args.source, args.out, dtype=args.dtype)
    size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    if args.json:
        output.emit_json({"merged": str(made), "bytes": size})
    else:
        output.emit(f"{made}: {args.source} merged into its base, {size / 1e6:,.0f} MB")
    return 0
