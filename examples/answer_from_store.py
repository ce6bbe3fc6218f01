"""Compress a folder of images once, then answer questions from the store; the images are not opened again.

    python examples/answer_from_store.py runs/quickstart/voco photos/ --store photos.store \\
        --question "What is on the table?"

Run it twice: the second time every image is found in the store and nothing is compressed. From the command
line it is `voco compress MODEL photos/ --store photos.store` and `voco generate MODEL --store photos.store`.
"""

from __future__ import annotations

import argparse
import time

import voco_plugin as vp
from voco_plugin.cli.inputs import find_images
from voco_plugin.cli.output import emit
from voco_plugin.data.images import open_image
from voco_plugin.inference.answering import answer, compress_images


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model with VoCo tokens: a folder or a hub id")
    parser.add_argument("images", help="a folder of images")
    parser.add_argument("--store", required=True, help="the store's folder; made if it is not there")
    parser.add_argument("--question", action="append", help="asked of each image; may be repeated")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args(argv)

    model, processor = vp.load(args.model)
    model.eval()
    paths = find_images([args.images])

    start = time.perf_counter()
    with vp.VoCoCacheStore.for_model(args.store, model) as store:
        keys = {path: store.key_of(path) for path in paths}  # the content decides, not the name
        missing = set(store.missing(keys.values()))
        new = {key: path for path, key in keys.items() if key in missing}  # the same image twice: once
        caches = compress_images(
            model, processor, (open_image(path) for path in new.values()), batch_size=args.batch_size
        )
        for key, cache in zip(new, caches, strict=True):
            store.put(key, cache)
        emit(f"{len(paths)} images, {len(new)} compressed in {time.perf_counter() - start:.1f} s; {store}")

        questions = args.question or ["What is in the image?"]
        asked = [(path, question) for path in paths for question in questions]
        answers = answer(
            model,
            processor,
            [question for _, question in asked],
            caches=[cache.to(model.device) for cache in store.get_many([keys[path] for path, _ in asked])],
        )
    for (path, question), text in zip(asked, answers, strict=True):
        emit(f"{path.name}\t{question}\t{text}")
    return {"images": len(paths), "compressed": len(new), "answers": answers}


if __name__ == "__main__":
    main()
