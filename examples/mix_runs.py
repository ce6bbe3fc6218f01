"""Images cached in different runs meet in one prompt, in any order, with text between them.

    python examples/mix_runs.py runs/quickstart/voco a.png b.png c.png --folder caches/

Each image is compressed by a process of its own into a file of its own. Then this process, which never opens
an image, puts them into prompts in several orders; and, to show that nothing is lost, opens them after all
and compares with one pass over each prompt.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import torch

import voco_plugin as vp
from voco_plugin.cli.output import emit
from voco_plugin.data.images import open_image
from voco_plugin.inference.prompts import encode, stream_of


def talk(order: tuple[int, ...], question: str) -> list[dict]:
    """One user turn: each image with its number in front, the question last."""
    content: list[dict] = []
    for place in range(len(order)):
        content += [{"type": "text", "text": f"Image {place + 1}: "}, {"type": "image"}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model with VoCo tokens: a folder or a hub id")
    parser.add_argument("images", nargs="+", type=Path, help="two images or more")
    parser.add_argument("--folder", required=True, type=Path, help="where the cache files go")
    parser.add_argument("--question", default="Which image shows more?")
    parser.add_argument("--orders", type=int, default=4, help="how many orders to try")
    args = parser.parse_args(argv)

    files = []
    for path in args.images:
        out = args.folder / f"{path.stem}.safetensors"
        command = [sys.executable, "-m", "voco_plugin", "compress", args.model, str(path), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        files.append(out)
    emit(f"{len(files)} caches of {len(files)} processes in {args.folder}")

    model, processor = vp.load(args.model)
    model.eval()
    caches = [vp.VoCoCache.load(file, device=model.device) for file in files]
    worst, answers = 0.0, []
    for order in itertools.islice(itertools.permutations(range(len(files))), args.orders):
        batch = [talk(order, args.question)]
        cache = vp.VoCoCache.cat([caches[i] for i in order])
        stream = {k: v.to(model.device) for k, v in stream_of(model, processor, batch, cache).items()}
        ids = model.generate(**stream, voco_cache=cache, max_new_tokens=16, do_sample=False)
        new = ids[0, stream["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True).strip())

        whole = encode(processor, batch, [[open_image(args.images[i]) for i in order]])
        whole = {
            k: v.to(model.device, model.dtype) if v.is_floating_point() else v.to(model.device)
            for k, v in model.insert_voco_tokens(whole).items()
        }
        expected = model(**whole).logits[0, -1]
        found = model(**stream, voco_cache=cache).logits[0, -1]
        worst = max(worst, float((expected - found).abs().max()))
        emit(f"order {order}: {answers[-1]!r}")
    emit(f"largest difference of a logit from one pass over the prompt with its images: {worst:.1e}")
    return {"files": len(files), "orders": len(answers), "answers": answers, "difference": worst}


if __name__ == "__main__":
    main()
