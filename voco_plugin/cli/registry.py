"""``voco registry``: what is registered under each name."""

from __future__ import annotations

import argparse
from typing import Any

from .. import registry
from ..config import nearest
from . import output

REGISTRIES = ("families", "encoders", "llms", "projectors", "compressors")


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "registry",
        parents=[common],
        help="list the families, encoders, LLMs, projectors and compressors",
        description="List what is registered, built in and by installed packages (entry points "
        "voco_plugin.<name>).",
        epilog="examples:\n  voco registry\n  voco registry families --json\n",
    )
    parser.add_argument("name", nargs="?", help=f"one registry: {', '.join(REGISTRIES)}")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    if args.name is not None and args.name not in REGISTRIES:
        raise ValueError(
            f"no registry {args.name!r}{nearest(args.name, REGISTRIES)}; one of {', '.join(REGISTRIES)}."
        )
    _load_built_in()
    names = REGISTRIES if args.name is None else (args.name,)
    found = {name: getattr(registry, name).list() for name in names}
    if args.json:
        output.emit_json(found)
    else:
        for name, entries in found.items():
            output.emit(f"{name}: {', '.join(entries) or 'none'}")
    return 0


def _load_built_in() -> None:
    """Import the packages whose files register the built-in components."""
    import importlib
    import importlib.util

    for name in REGISTRIES:
        if importlib.util.find_spec(f"voco_plugin.{name}") is not None:
            importlib.import_module(f"voco_plugin.{name}")
