"""``voco bench``: what attention, training and inference cost, and what fits a context."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import output
from .bench_tables import TABLES
from .preconditions import check_target
from .store import size

DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ("tiny", "small", "medium", "vicuna7b")
HIDDEN = {"out", "plot", "json", "debug", "help", "command", "what", "parser"}
"""What the recorded command leaves out: where results went."""


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure attention, training steps, inference; count what fits a context",
        description="Measure; ways alternate within one process and are compared by medians of their ratios.",
        epilog="examples:\n  voco bench attention --frames 4,16 --out attention.json --plot attention.png\n"
        "  voco bench inference --shape vicuna7b --dtype bfloat16 --device cuda --memory 80GB\n"
        "  voco bench context --num-tokens 2\n",
    )
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=type(parser))
    for name, (help_text, example, options, _) in _KINDS.items():
        one = kinds.add_parser(
            name, parents=[common], help=help_text, description=help_text[0].upper() + help_text[1:] + ".",
            epilog=f"example:\n  {example}\n",
        )  # fmt: skip
        options(one)
        one.add_argument("--quick", action="store_true", help="sizes of seconds, to see that it runs")
        one.add_argument("--out", metavar="JSON", help="write the result here")
        one.add_argument("--plot", metavar="PNG", help="draw it here (needs matplotlib)")
        one.add_argument("--json", action="store_true", help="print the JSON instead of the table")
        one.set_defaults(parser=one)


def run(args: argparse.Namespace) -> int:
    _, _, _, work = _KINDS[args.what]
    check_target(args.out, "--out")
    check_target(args.plot, "--plot")
    if args.plot:
        from ..benchmark.charts import check_charts

        check_charts()
    from ..benchmark.result_file import check_device, record, write

    check_device(args.device)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    settings, figures = work(args)
    result = record(
        args.what, figures, command=command_of(args), device=args.device, dtype=args.dtype, **settings
    )
    if args.out:
        write(result, args.out)
    if args.plot:
        from ..benchmark.charts import draw_benchmark

        draw_benchmark(result, args.plot)
    if args.json:
        output.emit_json(result)
    else:
        output.emit(TABLES[args.what](result))
        for path in filter(None, (args.out, args.plot)):
            output.emit(path)
    return 0


def command_of(args: argparse.Namespace) -> str:
    """The command that gives this result again: what differs from the defaults, without paths."""
    parts = ["voco", "bench", args.what]
    for action in args.parser._actions:
        if action.dest in HIDDEN or not action.option_strings:
            continue
        value = getattr(args, action.dest)
        default = action.default
        if isinstance(default, str) and action.type is not None:
            default = action.type(default)
        if value == default:
            continue
        parts.append(action.option_strings[0])
        if value is not True:
            parts.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return " ".join(parts)


# -- options
# ------------------------------------------------------------------------------------------------------------


def numbers(text: str) -> tuple[int, ...]:
    """``"1,4,16"`` → ``(1, 4, 16)``, each at least 1; empty gives none."""
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; write 1,4,16") from None
    if any(n < 1 for n in found):
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1; write 1,4,16")
    return found


def some(text: str) -> tuple[int, ...]:
    """:func:`numbers`, at least one."""
    found = numbers(text)
    if not found:
        raise argparse.ArgumentTypeError("give at least one number, as in 1,4,16")
    return found


def at_least(low: int) -> Callable[[str], int]:
    """An integer not below ``low``."""

    def integer(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {low}")
        return int(text)

    return integer


def _machine(parser: Any, repeats: int, limit: int) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default float32")
    parser.add_argument("--threads", type=at_least(1), help="of torch on a CPU (default: its own choice)")
    parser.add_argument(
        "--repeats", type=at_least(1), default=repeats, help=f"turns at most (default {repeats})"
    )
    parser.add_argument(
        "--limit", type=at_least(1), default=limit, metavar="S",
        help=f"seconds after which a case starts no new turn, once it has three (default {limit})",
    )  # fmt: skip


def _attention_options(parser: Any) -> None:
    _machine(parser, 15, 20)
    parser.add_argument("--frames", type=some, default="4,16,32,64", help="default 4,16,32,64")
    parser.add_argument("--vision", type=at_least(1), default=256, help="tokens of a frame (default 256)")
    parser.add_argument(
        "--single", type=at_least(0), default=576, help="tokens of the one-image case, 0 for none (576)"
    )
    parser.add_argument("--text", type=at_least(1), default=128, help="text tokens behind (default 128)")
    parser.add_argument("--num-tokens", type=at_least(1), default=2, metavar="K", help="default 2")
    parser.add_argument("--heads", type=at_least(1), default=8, help="default 8")
    parser.add_argument("--head-dim", type=at_least(1), default=64, help="default 64")
    parser.add_argument(
        "--backends", default="dense,segmented", help="compared with plain causal; default dense,segmented"
    )
    parser.add_argument(
        "--lengths", type=numbers, default="64,128,192,256,384,512,768,1024,1536,2048",
        help="of rows with one image, to find from where segments pay; '' for none",
    )  # fmt: skip


def _attention(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from ..benchmark.attention import attention
    from ..config import nearest
    from ..core.attention.backends import NAMES

    backends = tuple(part.strip() for part in args.backends.split(",") if part.strip())
    known = sorted({name for name, _ in NAMES})
    for name in backends:
        if name not in known:
            raise ValueError(
                f"--backends {name!r} is not known{nearest(name, known)}; use {', '.join(known)}."
            )
    if "dense" not in backends:
        raise ValueError(f"--backends {args.backends}: the others are compared with 'dense'; add it.")
    settings = {
        "single": args.single, "vision": args.vision, "num_tokens": args.num_tokens, "text": args.text,
        "heads": args.heads, "head_dim": args.head_dim, "repeats": args.repeats, "limit": args.limit,
    }  # fmt: skip
    frames, lengths = args.frames, args.lengths
    if args.quick:
        frames, lengths = (2, 4), (32, 64)
        settings |= {"single": 36, "vision": 16, "text": 8, "heads": 2, "head_dim": 16, "repeats": 3}
    settings["backends"] = tuple(sorted(backends, key=lambda name: name != "dense"))
    figures = attention(
        frames, lengths=lengths, device=args.device, dtype=args.dtype, tick=output.note, **settings
    )
    return settings, figures


def _train_options(parser: Any) -> None:
    _machine(parser, 10, 60)
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="default medium; vicuna7b is real")
    parser.add_argument("--layers", type=at_least(1), default=2, help="of the slice (default 2)")
    parser.add_argument("--images", type=some, default="1,4,16", help="of 576 tokens (default 1,4,16)")
    parser.add_argument("--text", type=at_least(2), default=128, help="text tokens behind (default 128)")
    parser.add_argument("--num-tokens", type=at_least(1), default=2, metavar="K", help="default 2")
    parser.add_argument("--tune", choices=("lora", "full"), default="lora", help="default lora (rank 64)")
    parser.add_argument("--profile", action="store_true", help="say where the time goes, too")


def _train(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from ..benchmark.training_step import train

    settings = {
        "shape": args.shape, "layers": args.layers, "tune": args.tune, "text": args.text,
        "num_tokens": args.num_tokens, "repeats": args.repeats, "limit": args.limit, "profile": args.profile,
    }  # fmt: skip
    images = args.images
    if args.quick:
        images = (1, 2)
        settings |= {"shape": "tiny", "layers": 1, "text": 16, "repeats": 2}
    figures = train(images, device=args.device, dtype=args.dtype, tick=output.note, **settings)
    return settings, figures


def _inference_options(parser: Any) -> None:
    _machine(parser, 15, 30)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="default small; vicuna7b is real")
    parser.add_argument("--text", type=some, default="32,128", help="tokens of the question (default 32,128)")
    parser.add_argument("--num-tokens", type=at_least(1), default=1, metavar="K", help="default 1")
    parser.add_argument("--batches", type=some, default="1,16", help="rows that decode (default 1,16)")
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="decode at the largest batch that fits, too: 80GB, 16GiB"
    )
    parser.add_argument("--images", type=some, default="1,8,64", help="in a prompt (default 1,8,64)")
    parser.add_argument("--answer", type=at_least(1), default=8, help="tokens of an answer (default 8)")
    parser.add_argument(
        "--count-only", action="store_true",
        help="storage and FLOPs alone, counted on one and two layers: a shape too large to run",
    )  # fmt: skip


def _inference(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from ..benchmark.table import counted_table, inference_table

    settings = {
        "shape": args.shape, "text": args.text, "num_tokens": args.num_tokens, "batches": args.batches,
        "memory": args.memory, "images": args.images, "answer": args.answer, "repeats": args.repeats,
        "limit": args.limit,
    }  # fmt: skip
    if args.quick:
        settings |= {
            "shape": "tiny", "text": (8,), "batches": (1, 2), "images": (1, 2), "answer": 2, "repeats": 2,
            "memory": None,
        }  # fmt: skip
    if args.count_only:
        used = {name: settings[name] for name in ("shape", "text", "num_tokens")}
        return used, counted_table(**used, dtype=args.dtype)
    return settings, inference_table(device=args.device, dtype=args.dtype, tick=output.note, **settings)


def _context_options(parser: Any) -> None:
    parser.add_argument("--num-tokens", type=some, default="1,2,8", metavar="K", help="default 1,2,8")
    parser.add_argument("--text", type=at_least(0), default=128, help="text tokens beside (default 128)")
    parser.add_argument("--contexts", type=numbers, default="", help="in tokens (default: each family's own)")
    parser.set_defaults(device="cpu", dtype="none", threads=None)


def _context(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    from ..benchmark.context_length import context_table, default_kinds

    settings = {"num_tokens": args.num_tokens, "text": args.text, "contexts": args.contexts}
    return settings, {"rows": context_table(default_kinds(), **settings)}


_KINDS: dict[str, tuple[str, str, Callable[[Any], None], Callable]] = {
    "attention": (
        "one layer's attention, forward and backward: backends against dense and plain causal SDPA",
        "voco bench attention --frames 4,16,32 --threads 2 --out attention.json --plot attention.png",
        _attention_options,
        _attention,
    ),
    "train": (
        "a whole training step of a slice: plain causal, VoCo dense, VoCo segmented",
        "voco bench train --shape vicuna7b --dtype bfloat16 --images 1,4 --out train.json --plot train.png",
        _train_options,
        _train,
    ),
    "inference": (
        "storage, first token, decoding, FLOPs and requests: no cache, full caching, VoCo cache",
        "voco bench inference --shape vicuna7b --dtype bfloat16 --device cuda --memory 80GB --out t7.json",
        _inference_options,
        _inference,
    ),
    "context": (
        "how many images or frames fit a context (arithmetic)",
        "voco bench context --num-tokens 2 --contexts 4096 --plot context.png",
        _context_options,
        _context,
    ),
}


def main(what: str, argv: Sequence[str] | None = None) -> int:
    """``voco bench WHAT ARGV``, for scripts."""
    from . import main as voco

    return voco(["bench", what, *(sys.argv[1:] if argv is None else argv)])
