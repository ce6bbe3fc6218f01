"""What one, four, twelve or 48 questions about a picture cost: time, and bytes kept between them.

    python benchmarks/cost_of_questions.py runs/gridworld_voco --data runs/gridworld/test.json \\
        --image-folder runs/gridworld/images --out cost_of_questions.json

Three ways, each asked in turn on one picture after another, one question at a time, four tokens an answer:

    read    the plain model reads the picture for every question
    kept    the plain model reads it once and keeps keys and values of all vision tokens (prefix caching)
    voco    the picture is compressed once, and the block answers

Where 48 questions are asked and the set has fewer a picture, they come again.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch

import voco_plugin as vp
from voco_plugin._compat import cache_names
from voco_plugin.benchmark import result_file
from voco_plugin.benchmark.timing import compare, interleaved_times
from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.evaluation.metrics import images_of, questions_of
from voco_plugin.inference.answering import answer, compress_images
from voco_plugin.inference.prompts import ask, encode

COUNTS = (1, 4, 12, 48)
TOKENS = 4


class Kept:
    """The plain model's keys and values of the prompt up to the end of the picture."""

    def __init__(self, model: Any, processor: Any, picture: Any) -> None:
        self.model, self.processor, self.picture = model, processor, picture
        inputs = encode(processor, [ask("")], [[picture]])
        last = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1])
        inputs = {
            k: v[:, : last + 1] if v.shape == inputs["input_ids"].shape else v for k, v in inputs.items()
        }
        with torch.no_grad():
            self.cache = getattr(model(**inputs, use_cache=True), cache_names()[0])

    def bytes(self) -> int:
        kept = (t for layer in self.cache.layers for t in (layer.keys, layer.values))
        return sum(t.numel() * t.element_size() for t in kept)

    @torch.no_grad()
    def __call__(self, question: str) -> Any:
        inputs = encode(self.processor, [ask(question)], [[self.picture]])
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        cache = {cache_names()[0]: copy.deepcopy(self.cache)}
        return self.model.generate(
            **given, **cache, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, help="questions with one picture each")
    parser.add_argument("--image-folder")
    parser.add_argument("--repeats", type=int, default=9, help="pictures (default: %(default)s)")
    parser.add_argument("--out", help="JSON of the result")
    args = parser.parse_args()
    model, processor = vp.load(args.model)
    plain = vp.load(args.model)[0]
    plain = vp.detach(plain.unload() if hasattr(plain, "unload") else plain)
    dataset = load_vision_dataset(args.data, None, args.image_folder)
    by_row: dict[int, list[str]] = {}
    for question in questions_of(dataset):
        by_row.setdefault(question.row, []).append(question.text)
    rows = list(by_row)
    long = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    result: dict[str, Any] = {"model": Path(args.model).name, "answer_tokens": TOKENS, "counts": {}}
    for count in COUNTS:
        turns = {"read": 0, "kept": 0, "voco": 0}

        def drawn(way: str, turns: dict[str, int] = turns, count: int = count) -> tuple[Any, list[str]]:
            row = rows[turns[way] % len(rows)]
            turns[way] += 1
            texts = by_row[row]
            return images_of(dataset[row])[0], [texts[i % len(texts)] for i in range(count)]

        def read() -> Any:
            picture, texts = drawn("read")
            return lambda: [answer(plain, processor, [t], images=[[picture]], **long) for t in texts]

        def kept() -> Any:
            picture, texts = drawn("kept")

            def run() -> None:
                reader = Kept(plain, processor, picture)
                for text in texts:
                    reader(text)

            return run

        def voco() -> Any:
            picture, texts = drawn("voco")

            def run() -> None:
                (block,) = compress_images(model, processor, [picture])
                for text in texts:
                    answer(model, processor, [text], caches=[block], **long)

            return run

        times = interleaved_times({"read": read, "kept": kept, "voco": voco}, args.repeats, warm_up=1)
        found = compare(times, "read")
        result["counts"][count] = {name: {key: found[key][name] for key in found} for name in times}
        told = ", ".join(f"{n} {found['seconds'][n]:.2f} s ({found['ratio'][n]:.2f})" for n in times)
        print(f"{count:3} questions: {told}")
    picture = images_of(dataset[rows[0]])[0]
    (block,) = compress_images(model, processor, [picture])
    result["bytes"] = {"read": 0, "kept": Kept(plain, processor, picture).bytes(), "voco": block.nbytes}
    print(
        f"kept between questions: {result['bytes']['kept']:,} bytes, as a block {result['bytes']['voco']:,}"
    )
    if args.out:
        found = result_file.record(
            "cost_of_questions", result, command="python benchmarks/cost_of_questions.py MODEL", device="cpu",
            dtype=str(model.dtype).removeprefix("torch."), repeats=args.repeats,
        )  # fmt: skip
        result_file.write(found, args.out)


if __name__ == "__main__":
    main()
