"""``voco recipes``: list, show and copy the shipped training recipes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files import atomic_write_text
from . import output
from .recipe import find, shipped, summary
from .study_file import shipped as shipped_studies


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "recipes",
        parents=[common],
        help="list, show or copy the shipped recipes",
        description="List the shipped recipes, show one, or copy one to change it; show and copy take\n"
        "studies too (`voco study --list`).",
        epilog="examples:\n  voco recipes\n  voco recipes show gridworld_voco\n"
        "  voco recipes copy gridworld_voco my.yaml\n",
    )
    parser.add_argument(
        "action", nargs="?", default="list", choices=("list", "show", "copy"), help="default: list"
    )
    parser.add_argument("name", nargs="?", help="the recipe to show or copy")
    parser.add_argument("target", nargs="?", help="where to copy it (default: ./NAME.yaml)")
    parser.add_argument("--force", action="store_true", help="overwrite the target of copy")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        if args.name is not None:
            raise ValueError(
                f"`voco recipes list` takes no name ({args.name!r}); use `voco recipes show {args.name}`."
            )
        found = {name: summary(path) for name, path in shipped().items()}
        if args.json:
            output.emit_json([{"name": n, "summary": s, "path": str(shipped()[n])} for n, s in found.items()])
        else:
            output.emit(output.table(found.items(), ("recipe", "what it does")))
        return 0
    if args.name is None:
        raise ValueError(f"`voco recipes {args.action}` needs a name: one of {', '.join(shipped())}.")
    studies = shipped_studies()
    source = studies[args.name] if args.name in studies else find(args.name)
    text = source.read_text(encoding="utf-8")
    if args.action == "show":
        output.emit(text.rstrip("\n"))
        return 0
    target = Path(args.target or f"{source.stem}.yaml").expanduser()
    if target.is_dir():
        target = target / source.name
    if target.exists() and not args.force:
        raise ValueError(f"{target} exists already; give another target, or --force.")
    atomic_write_text(target, text)
    output.emit(str(target))
    return 0
