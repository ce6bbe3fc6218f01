"""The ``voco`` command.

Each subcommand is one file with ``add(subparsers, common)`` and ``run(args) -> int``; torch and the models
are imported by the work, not by the parser, so ``--help`` and errors are quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from ..config import nearest
from . import output
from .flags import as_flags

COMMANDS: tuple[str, ...] = (
    "train", "compress", "generate", "eval", "inspect", "recipes", "registry", "gridworld", "pictures",
    "pictures-tower", "pictures-align", "convert", "merge", "store", "bench", "study",
    "demo", "export", "serve",
)  # fmt: skip
_MODULE = {"eval": "evaluate", "registry": "list_registry", "pictures-tower": "pictures_tower",
           "pictures-align": "pictures_align"}  # fmt: skip

USER_ERRORS = (ValueError, OSError, ImportError)
"""What a user can get wrong: a value, a file, an extra that is not installed."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with status 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        output.error(self.prog, f"{message} ({self.prog} --help shows the options)")
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = Parser(
        prog="voco",
        description="Vision compression inside the LLM: train VoCo tokens, compress images, answer from "
        "the cache.",
        epilog="example:\n  voco recipes\n  voco train gridworld_voco --max_steps 100\n",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        _module(command).add(subparsers, common)
        subparsers.choices[command].set_defaults(parser=subparsers.choices[command])
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f".{_MODULE.get(command, command)}", __name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``voco ARGV``; returns the exit status: 0, 2 for what the user got wrong, 130 when interrupted."""
    # before torch starts its threads: waiting threads that spin slow a small model down eight times where
    # another process wants the cores (docs/decisions.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # PEFT and TRL still use transformers' former names; who types a command cannot change that
    warnings.filterwarnings(
        "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
    )
    output.print_anything()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        output.error(
            "voco", f"no command {argv[0]!r}{nearest(argv[0], COMMANDS)}; use one of {', '.join(COMMANDS)}."
        )
        return 2
    try:
        parser = build_parser()
        args, unknown = parser.parse_known_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if unknown:
        known = args.parser._option_string_actions if args.command else parser._option_string_actions
        hint = nearest(unknown[0], known)
        output.error(
            f"voco {args.command or ''}".strip(), f"unknown argument {unknown[0]!r}{hint}; --help shows all."
        )
        return 2
    if args.version:
        from importlib.metadata import PackageNotFoundError, version

        try:
            output.emit(version("voco_plugin"))
        except PackageNotFoundError:
            output.emit("unknown (not installed)")
        return 0
    args.argv = argv  # for a command that runs itself again in several processes
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(_module(args.command).run(args) or 0)
    except BrokenPipeError:  # the reader (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        output.error(f"voco {args.command}", "interrupted")
        return 130
    except USER_ERRORS as problem:
        if args.debug:
            raise
        said = str(problem)
        if args.command != "train":  # whose keys are what is typed
            said = as_flags(said, args.parser, getattr(_module(args.command), "KEYWORDS", None))
        output.error(f"voco {args.command}", said or type(problem).__name__)
        return 2
