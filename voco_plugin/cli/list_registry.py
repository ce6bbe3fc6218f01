"""``voco registry``: what is registered under each name, and what can be said of it without loading it."""

from __future__ import annotations

import argparse
from typing import Any

from .. import registry
from ..config import nearest
from . import output

REGISTRIES = ("families", "encoders", "llms", "projectors", "compressors")
COLUMNS = ("source", "library", "licence", "hidden_size", "num_tokens")


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "registry",
        parents=[common],
        help="list the families, encoders, LLMs, projectors and compressors",
        description="List what is registered: built in, by installed packages (entry points "
        "voco_plugin.<name>) and by --plugin.\nlicence: of the default weights (unknown: see its card);\n"
        "num_tokens are an image's at the encoder's default resolution.",
        epilog="examples:\n  voco registry\n  voco registry encoders --json\n"
        "  voco registry llms --plugin my_llms.py\n",
    )
    parser.add_argument("name", nargs="?", help=f"one registry: {', '.join(REGISTRIES)}")
    parser.add_argument(
        "--plugin", action="append", metavar="FILE", help="a Python file that registers components"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    if args.name is not None and args.name not in REGISTRIES:
        raise ValueError(
            f"no registry {args.name!r}{nearest(args.name, REGISTRIES)}; one of {', '.join(REGISTRIES)}."
        )
    for file in args.plugin or []:
        registry.load_plugin(file)
    names = REGISTRIES if args.name is None else (args.name,)
    found = {name: entries(name) for name in names}
    if args.json:
        output.emit_json(found)
        return 0
    for name, rows in found.items():
        output.emit(f"{name}: {'none' if not rows else ''}".rstrip())
        if rows and any(set(row) - {"name"} for row in rows):
            columns = [c for c in COLUMNS if any(c in row for row in rows)]
            table = [[row["name"], *(row.get(c) for c in columns)] for row in rows]
            output.emit(output.table(table, ("name", *columns)))
        elif rows:
            output.emit("  " + ", ".join(row["name"] for row in rows))
        output.emit()
    return 0


def entries(name: str) -> list[dict[str, Any]]:
    """Name and facts of every entry of a registry; a component without facts has its name alone."""
    found = getattr(registry, name)
    rows: list[dict[str, Any]] = []
    for key in found.list():
        row: dict[str, Any] = {"name": key}
        if name in ("encoders", "llms"):
            component = found.get(key)
            row |= {c: getattr(component, c) for c in COLUMNS if hasattr(component, c)}
        rows.append(row)
    return rows
