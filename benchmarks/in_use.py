"""What a compressor is worth in use: pictures cached in a store, questions answered from it.

    python benchmarks/in_use.py MODEL --data test.json --images photos/ --work stores/ --out in_use.json
    python benchmarks/in_use.py runs/gridworld_voco --data runs/gridworld/test.json \\
        --images runs/gridworld/images/train --count 100 --questions 60 --work stores/

Measured, in one process:

    caching   images a second into an LMDB store, values kept and int8; bytes an image on disk, beside keys
              and values of the vision tokens that it stands for
    asking    time to the first token of a question: from the store, and of the plain model on the picture
              (tower, all vision tokens), in turns; the median of the ratios
    int8      accuracy of all questions from either store, and how many answers differ
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import voco_plugin as vp
from voco_plugin.benchmark.result_file import environment
from voco_plugin.benchmark.timing import compare, interleaved_times
from voco_plugin.cli.inputs import find_images
from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.evaluation.metrics import evaluate, images_of, questions_of
from voco_plugin.files import atomic_write_text
from voco_plugin.inference.answering import answer, compress_images


def fill(
    model: Any, processor: Any, paths: list[Path], folder: Path, values: str, batch: int
) -> dict[str, Any]:
    """Compress ``paths`` into a new store at ``folder``."""
    with vp.VoCoCacheStore.for_model(folder, model, values=values) as store:
        start = time.perf_counter()
        for begin in range(0, len(paths), batch):
            part = [Image.open(path).convert("RGB") for path in paths[begin : begin + batch]]
            caches = list(compress_images(model, processor, part, batch_size=batch))
            store.put_many([(store.key_of(p), c) for p, c in zip(part, caches, strict=True)])
        seconds = time.perf_counter() - start
        size = store.stat()
    found = {"images": len(paths), "images_a_second": len(paths) / seconds, "store": size}
    found["bytes_on_disk_an_image"] = sum(f.stat().st_size for f in folder.iterdir()) / len(paths)
    return found


def vision_bytes(model: Any, processor: Any, picture: Any) -> tuple[int, int]:
    """Vision tokens of a picture, and the bytes of their keys and values in the model's dtype."""
    from voco_plugin.inference.prompts import ask, encode

    inputs = encode(processor, [ask("")], [[picture]])
    text = model.config.get_text_config()
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = 2 * text.num_hidden_layers * text.num_key_value_heads * head
    return tokens, tokens * width * torch.empty((), dtype=model.dtype).element_size()


def first_tokens(
    model: Any, plain: Any, processor: Any, store: Any, asked: list[tuple[Any, str]], repeats: int
) -> dict[str, Any]:
    """Time to the first token, one question at a time: from the store and of the plain model."""
    turn = {"cached": 0, "plain": 0}

    def question(name: str) -> tuple[Any, str]:
        turn[name] += 1
        return asked[turn[name] % len(asked)]

    def cached() -> Any:
        picture, text = question("cached")
        key = store.key_of(picture)
        return lambda: answer(model, processor, [text], caches=[store.get(key)], max_new_tokens=1)

    def uncompressed() -> Any:
        picture, text = question("plain")
        return lambda: answer(plain, processor, [text], images=[[picture]], max_new_tokens=1)

    times = interleaved_times({"plain": uncompressed, "cached": cached}, repeats)
    found = compare(times, "plain")
    return {name: {key: found[key][name] for key in found} for name in times}


def from_store(model: Any, processor: Any, dataset: Any, questions: Any, store: Any) -> Any:
    """The score of all questions with the blocks that ``store`` gives back."""
    rows = sorted({q.row for q in questions})
    caches: dict[int, Any] = {}
    for row in rows:
        (picture,) = images_of(dataset[row])
        key = store.key_of(picture)
        if key not in store:
            (made,) = compress_images(model, processor, [picture])
            store.put(key, made)
        caches[row] = store.get(key)
    return evaluate(model, processor, dataset, questions, mode="cache", caches=caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, help="questions with one picture each")
    parser.add_argument("--image-folder")
    parser.add_argument("--images", required=True, help="a folder of pictures to cache")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--questions", type=int, help="the first so many only")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--work", type=Path, required=True, help="a new folder for the two stores")
    parser.add_argument("--out", help="JSON of the result")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    model, processor = vp.load(args.model)
    plain = vp.load(args.model)[0]
    plain = vp.detach(plain.unload() if hasattr(plain, "unload") else plain)
    paths = [Path(p) for p in find_images([args.images])][: args.count]
    result: dict[str, Any] = {"model": Path(args.model).name, "caching": {}}
    for values in ("keep", "int8"):
        found = fill(model, processor, paths, args.work / values, values, args.batch_size)
        result["caching"][values] = found
        print(
            f"{values:5} {found['images_a_second']:8.1f} images a second, "
            f"{found['bytes_on_disk_an_image']:10,.0f} bytes an image on disk"
        )
    tokens, size = vision_bytes(plain, processor, Image.open(paths[0]).convert("RGB"))
    result["vision_tokens"] = {"tokens": tokens, "bytes": size}
    print(f"its {tokens} vision tokens' keys and values: {size:,} bytes an image")
    dataset = load_vision_dataset(args.data, None, args.image_folder)
    questions = questions_of(dataset)[: args.questions]
    with vp.VoCoCacheStore.for_model(args.work / "keep", model) as store:
        whole = from_store(model, processor, dataset, questions, store)
        asked = [(images_of(dataset[q.row])[0], q.text) for q in questions[:: max(1, len(questions) // 40)]]
        result["first_token"] = first_tokens(model, plain, processor, store, asked, args.repeats)
    with vp.VoCoCacheStore.for_model(args.work / "int8", model) as store:
        small = from_store(model, processor, dataset, questions, store)
    differ = sum(a != b for a, b in zip(whole.answers, small.answers, strict=True))
    result["int8"] = {
        "questions": len(questions), "accuracy_kept": whole.accuracy, "accuracy_int8": small.accuracy,
        "answers_that_differ": differ,
    }  # fmt: skip
    result["environment"] = environment("cpu")
    found = result["first_token"]
    print(
        f"first token: {1e3 * found['cached']['seconds']:.1f} ms from the store, "
        f"{1e3 * found['plain']['seconds']:.1f} ms uncompressed, ratio {found['cached']['ratio']:.2f}"
    )
    print(
        f"accuracy {100 * whole.accuracy:.2f} % kept, {100 * small.accuracy:.2f} % int8; "
        f"{differ} of {len(questions)} answers differ"
    )
    if args.out:
        atomic_write_text(args.out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
