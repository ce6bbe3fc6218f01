"""``voco demo``: a page, or a terminal, to ask a model about images and see what its cache saves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import output
from .inputs import find_images, load_model, open_image, positive
from .preconditions import check_packages
from .shipped_models import model_source

_SHIPPED_TOKENS = [4, 1, 2, 8]


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "demo",
        parents=[common],
        help="a page (or the terminal) to ask a model about images",
        description="Open a page on this machine: drop an image or a short video, ask, several turns; beside "
        "the answer\nwhat the cache takes and what every vision token would. Without MODEL, or by name, a "
        "small model that\nships with the package: gridworld (digits and shapes), pictures (SmolLM2-135M on "
        "named pictures).",
        epilog="examples:\n  voco demo\n  voco demo pictures --terminal\n"
        "  voco demo runs/gridworld_voco --port 8080\n"
        "  voco demo gridworld --terminal --image a.png --question 'What is at b2?'\n",
    )
    parser.add_argument(
        "model", nargs="?", default="gridworld", metavar="MODEL",
        help="gridworld (default), pictures, or a VoCo checkpoint, VLM or hub id",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FOLDER", help="where a model that ships is written (runs/demo_NAME)"
    )
    parser.add_argument("--terminal", action="store_true", help="ask in the terminal, without a page")
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="of --terminal: an image or a folder; repeatable"
    )
    parser.add_argument(
        "--question", action="append", metavar="TEXT",
        help="of --terminal: ask this of each image and leave; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--num-tokens", type=_counts, metavar="K[,K…]", help="VoCo tokens an image; the page offers them all"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="of an answer (%(default)s)")
    parser.add_argument(
        "--no-compare", action="store_true", help="without the uncompressed model, which is loaded on demand"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of the page (%(default)s: this machine)")
    parser.add_argument("--port", type=int, default=7860, help="of the page (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: the checkpoint's"
    )
    parser.add_argument(
        "--plugin", action="append", metavar="FILE", help="a Python file that registers components"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    if not args.terminal:
        check_packages({"gradio": "'voco_plugin[demo]'"}, "the page of voco demo")
        unused = [name for name in ("image", "question") if getattr(args, name)]
        if unused:
            raise ValueError(f"--{unused[0]} is of --terminal: add it, or drop the image on the page.")
        if not 0 <= args.port <= 65535:
            raise ValueError(f"--port {args.port} is none: give 1 to 65535, or 0 for any that is free.")
    images = find_images(args.image or [])
    name, source, examples = model_source(args.model, args.out, "voco demo")
    model, processor = _loaded(args, source)
    tokens = args.num_tokens or (_SHIPPED_TOKENS if examples else None)
    if args.terminal:
        return _terminal(args, model, processor, tokens, images, examples)
    return _page(args, model, processor, tokens, name, source, examples)


def _counts(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _loaded(args: argparse.Namespace, source: str) -> tuple[Any, Any]:
    """The model with its adapter merged in memory, where that is the same model: answers cost less."""
    from ..core.attachment import attachment

    model, processor = load_model(args, source=source)
    config = attachment(model).config
    if hasattr(model, "merge_and_unload") and config.adapter_stages == "both" and not config.frozen_stage1:
        model = model.merge_and_unload()
    return model.eval(), processor


def _plain(args: argparse.Namespace, source: str) -> Any:
    """The model without VoCo, loaded a second time: what it is now must not come apart. An adapter that acts
    in one stage alone comes off, any other stays."""
    from ..models import detach
    from .eval_modes import plain_model

    model, _ = _loaded(args, source)
    return plain_model(model, detach).eval()


def _page(
    args: argparse.Namespace, model: Any, processor: Any, tokens: Any, name: str, source: str, examples: Any
) -> int:
    from ..serving.page import THEME, build_page
    from ..training.parts import is_peft

    page = build_page(
        model, processor, name=name, num_tokens=tokens,
        examples=[(file, question) for file, question, _ in examples],
        plain=None if args.no_compare else lambda: _plain(args, source), max_new_tokens=args.max_new_tokens,
        plain_name="its base, without the adapter" if is_peft(model) else "the same weights without VoCo",
    )  # fmt: skip
    folders = sorted({str(Path(file).parent.absolute()) for file, *_ in examples})
    try:
        _, url, _ = page.launch(
            server_name=args.host, server_port=args.port or None, theme=THEME, quiet=True, footer_links=[],
            prevent_thread_lock=True, allowed_paths=folders, max_file_size="64mb", share=False,
        )  # fmt: skip
    except OSError as problem:
        where = f"{args.host}:{args.port}"
        raise OSError(
            f"no page at {where}: the port is taken, or may not be opened here; give another --port (0: any)."
        ) from problem
    output.emit(url)
    output.note("the page is open until this command ends (Ctrl-C)")
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        output.note(f"whoever reaches {args.host} can use it: the page has no password")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
    return 0


def _terminal(
    args: argparse.Namespace, model: Any, processor: Any, tokens: Any, images: Any, examples: Any
) -> int:
    """Each image in turn: the questions given, or an example's own and then what is typed."""
    from ..serving.page_words import added_line, answered_line
    from ..serving.picture_chat import PictureChat

    chat = PictureChat(
        model, processor, num_tokens=tokens[0] if tokens else None, max_new_tokens=args.max_new_tokens
    )
    given = [(question, "") for question in args.question or []]
    shown = [(str(path), given) for path in images]
    if not images:
        shown = [(path, given or [(question, answer)]) for path, question, answer in examples]
    if not shown:
        raise ValueError("nothing to look at: give --image FILE.")
    for path, asked in shown:
        chat.clear()
        output.emit(added_line(chat.show(open_image(path), Path(path).name)))
        for question, answer in _asked(path, asked, typing=not args.question):
            output.emit(f"  {question}")
            for _ in chat.ask(question):
                pass
            assert chat.last is not None
            right = f"   (it is: {answer})" if answer else ""
            output.emit(f"    {answered_line(chat.last)}{right}")
    return 0


def _asked(path: str, asked: list[tuple[str, str]], typing: bool) -> Iterator[tuple[str, str]]:
    """What is asked, with the right answer where it is known; then, at a terminal, what is typed up to an
    empty line."""
    yield from asked
    if not typing or (asked and not sys.stdin.isatty()):
        return
    output.note(f"[{path}] ask (an empty line: the next image; Ctrl-D: leave)")
    for line in sys.stdin:
        if not line.strip():
            return
        yield line.strip(), ""
    raise SystemExit(0)
