"""The options of ``voco compress`` for large jobs: where from, where to, how many at work."""

from __future__ import annotations

import argparse
from typing import Any

from .inputs import positive
from .store import size

ONLY_IN_BULK: dict[str, Any] = {
    "split": None, "image_column": None, "image_folder": None, "streaming": False, "max_memory": None,
    "int8": False, "max_bytes": None, "engine": "local", "workers": None, "threads": 2,
}  # fmt: skip
"""Options that mean nothing with ``--out``, and their defaults."""


def add_bulk_options(parser: argparse.ArgumentParser) -> None:
    """``--store``, ``--shards`` and what belongs to them."""
    to = parser.add_argument_group("where to (at least one)")
    to.add_argument("--store", metavar="DIR", help="a store of caches by content; made where it is missing")
    to.add_argument(
        "--shards", metavar="URL", help="Parquet shards: a folder, file://, memory://, s3://bucket/prefix, …"
    )
    to.add_argument("--int8", action="store_true", help="a new store keeps 8 bits a value")
    to.add_argument(
        "--max-bytes", type=size, metavar="SIZE", help="limit of the store (20GB, 512MiB); oldest use goes"
    )
    source = parser.add_argument_group("where from")
    source.add_argument("--split", help="of a dataset (default: the only one, or train)")
    source.add_argument("--image-column", metavar="NAME", help="of a dataset or of JSON records")
    source.add_argument("--image-folder", metavar="DIR", help="where the image names of a JSON file start")
    source.add_argument("--streaming", action="store_true", help="read a dataset without keeping a copy")
    work = parser.add_argument_group("how")
    work.add_argument("--engine", choices=("local", "ray"), default="local", help="default: %(default)s")
    work.add_argument(
        "--workers", type=positive, metavar="N", help="processes on this machine, or Ray workers (default: 1)"
    )
    work.add_argument(
        "--max-memory", type=size, metavar="SIZE", help="what stage 1 may take at once (8GB, 512MiB)"
    )
    work.add_argument(
        "--threads", type=int, default=2, metavar="N", help="that decode ahead (default: %(default)s)"
    )


def check_no_bulk_options(args: argparse.Namespace) -> None:
    """Raise where ``--out`` would make an option be ignored."""
    if args.store or args.shards:
        raise ValueError("--out writes cache files; leave it out with --store or --shards.")
    for name, default in ONLY_IN_BULK.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} needs --store or --shards.")


def check_bulk_options(args: argparse.Namespace) -> None:
    """Raises where the options do not say where to, or contradict each other."""
    if not (args.store or args.shards):
        raise ValueError("nowhere to write: give --store DIR, --shards URL or --out OUT.")
    for name in ("int8", "max_bytes"):
        if getattr(args, name) and not args.store:
            raise ValueError(f"--{name.replace('_', '-')} is of a store: give --store DIR.")
    if args.threads < 0:
        raise ValueError(f"--threads {args.threads} is negative; 0 decodes in turn.")
