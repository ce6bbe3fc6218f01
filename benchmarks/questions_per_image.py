"""What one compression an image saves where a benchmark asks several questions about it.

    python benchmarks/questions_per_image.py [--questions 12 --images 4] [--out FILE]

A tiny VLM of 576 vision tokens answers ``--images`` × ``--questions`` prompts as the model ``voco`` of
lmms-eval does (its reader, without the harness around it), ways alternately in one process, medians of the
turns and of the ratios within a turn:

    an image      each image is compressed once into a store (the way of the harness's model)
    stored        the store has them already: a later run
    a question    each question's image is compressed for itself, then answered from that block
    single        one pass over vision tokens and question, no cache

Answers of all ways must be equal. Decoding is cut to ``--new-tokens``. One JSON value on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import voco_plugin as vp
from voco_plugin.benchmark import result_file
from voco_plugin.benchmark.timing import compare, interleaved_times
from voco_plugin.cli.accelerate_launch import load_integration
from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm

SIDE, PATCH = 192, 8


def model_of(args: argparse.Namespace) -> tuple[Any, Any]:
    model, processor = build_tiny_vlm(
        image_size=SIDE, patch_size=PATCH, text_width=args.width, text_layers=args.layers, text_heads=8
    )
    return vp.attach(model.eval(), vp.VoCoConfig(num_tokens=1), processor=processor), processor


def pictures(count: int) -> list[Image.Image]:
    made = []
    for number in range(count):
        noise = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(number))
        made.append(Image.fromarray(noise.to(torch.uint8).numpy()))
    return made


def ways_of(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The timed ways, and where each leaves its answers."""
    model, processor = model_of(args)
    loading, arguments, messages = (
        load_integration(f"lmms_eval.{name}") for name in ("loading", "arguments", "messages")
    )
    shown = pictures(args.images)
    asked = [(image, f"What colour is in cell {n}?") for image in shown for n in range(args.questions)]
    answers: dict[str, list[str]] = {}
    options = {"max_new_tokens": args.new_tokens}

    def prompts() -> list[Any]:
        return [messages.read_simple(text, [image], messages.Videos(), "x") for image, text in asked]

    def through(name: str, mode: str, store: Callable[[], str | None]) -> Callable[[], Any]:
        def made() -> Any:
            given = arguments.ModelArgs("", batch_size=args.questions, mode=mode, store=store())
            reader, listed = loading.reader_of(model, processor, given), prompts()

            def run() -> None:
                answers[name] = reader.answer(listed, **options)
                reader.close()

            return run

        return made

    def a_question() -> Any:
        def run() -> None:
            said = []
            for start in range(0, len(asked), args.questions):
                part = asked[start : start + args.questions]
                caches = list(
                    vp.compress_images(model, processor, [i for i, _ in part], batch_size=args.questions)
                )
                said += vp.answer(model, processor, [t for _, t in part], caches=caches,
                                  batch_size=args.questions, **options)  # fmt: skip
            answers["a question"] = said

        return run

    kept = str(folder / "kept")
    through("stored", "voco", lambda: kept)()()
    return {
        "an image": through("an image", "voco", lambda: None),
        "stored": through("stored", "voco", lambda: kept),
        "a question": a_question,
        "single": through("single", "single", lambda: None),
    }, answers


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ways, answers = ways_of(args, Path(folder))
        times = interleaved_times(ways, args.repeats, 1)
    if len({tuple(said) for said in answers.values()}) != 1:
        raise SystemExit("the ways do not answer alike")
    found = result_file.record(
        "questions_per_image", compare(times, "an image"),
        command="python benchmarks/questions_per_image.py", device="cpu", dtype="float32",
        vision_tokens=(SIDE // PATCH) ** 2, num_tokens=1, questions=args.questions, images=args.images,
        width=args.width, layers=args.layers, new_tokens=args.new_tokens, repeats=args.repeats,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if args.out:
        result_file.write(found, args.out)
    return found


if __name__ == "__main__":
    json.dump(main(), sys.stdout, indent=1)
    print()
