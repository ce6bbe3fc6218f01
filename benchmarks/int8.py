"""Ways to keep caches in 8 bits, by what they cost in logits: the figures behind ``cache/int8.py``.

    python benchmarks/int8.py [--images 256] [--outliers 8]

The base VLM that ships with the package compresses gridworld images; stage 2 answers from the blocks as they
are and from quantised ones. ``--outliers F`` makes four channels of every key ``F`` times as large and the
queries' as much smaller: the same model, exactly, with the outlying channels that large LLMs have. The scales
per channel are taken from the first half of the images and used for the second, as a store would have to.
One JSON value on stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import torch

import voco_plugin as vp
from voco_plugin.cache import int8
from voco_plugin.cli.gridworld import copy_base
from voco_plugin.gridworld.scenes import draw_scene, sample_scene
from voco_plugin.inference.answering import compress_images, prompt

QUESTIONS = ("what color is the object in a1?", "how many red objects are there?")
Change = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def changed(cache: vp.VoCoCache, key: Change, value: Change) -> vp.VoCoCache:
    """``cache`` with each block's per-layer keys and values replaced."""
    blocks = [
        dataclasses.replace(b, keys=tuple(key(list(b.keys))), values=tuple(value(list(b.values))))
        for b in cache
    ]
    return vp.VoCoCache(blocks, cache.rows, cache.num_rows, cache.fingerprint)


def by_group(group: int) -> Change:
    """The way of ``cache/int8.py``, with groups of another size."""

    def change(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        named = {str(n): t.transpose(0, 1) for n, t in enumerate(tensors)}
        back = int8.dequantize(int8.quantize(named, group), tensors[0].dtype, group)
        return [back[str(n)].transpose(0, 1) for n in range(len(tensors))]

    return change


def by_channel(seen: list[tuple[torch.Tensor, ...]]) -> Change:
    """A scale per layer, head and channel, shared by all blocks: the largest value ``seen``."""
    scales = [
        torch.cat(layer, dim=1).abs().amax(dim=1, keepdim=True) / 127 for layer in zip(*seen, strict=True)
    ]

    def change(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [(t / s).round().clamp(-127, 127) * s for t, s in zip(tensors, scales, strict=True)]

    return change


@torch.no_grad()
def stick_out(model, factor: float) -> None:
    """Four key channels of each head ``factor`` times as large, the queries' as much smaller."""
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        dim = attention.head_dim
        for weight, by in ((attention.k_proj.weight, factor), (attention.q_proj.weight, 1 / factor)):
            for channel in (3, 3 + dim // 2, 9, 9 + dim // 2):  # pairs that turn together
                weight[channel::dim] *= by


@torch.no_grad()
def measure(images: int, tokens: int, outliers: float) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    drawn = [draw_scene(sample_scene(rng, 2, 4, "train"), rng, 32) for _ in range(images)]
    with tempfile.TemporaryDirectory() as folder:
        copy_base(f"{folder}/base")
        torch.manual_seed(0)
        model, processor = vp.load(f"{folder}/base", voco=vp.VoCoConfig(num_tokens=tokens))
    model.eval()
    stick_out(model, outliers)
    caches = list(compress_images(model, processor, drawn, batch_size=64))
    first, rest = caches[: images // 2], caches[images // 2 :]
    inputs = prompt(model, processor, [QUESTIONS[n % 2] for n in range(len(rest))], caches=rest)
    cache = inputs.pop("voco_cache")
    voco = inputs["input_ids"] == vp.attachment(model).vocab.voco_id
    chosen = inputs["attention_mask"].bool() & ~voco & (voco.cumsum(dim=1) > 0)
    exact = model(**inputs, voco_cache=cache).logits[chosen]
    ways = {f"groups of {g}": (1 + 2 / g, by_group(g), by_group(g)) for g in (8, 16, 32)}
    seen = [b for c in first for b in c]
    channels = by_channel([b.keys for b in seen]), by_channel([b.values for b in seen])
    ways["per channel, shared"] = (1.0, *channels)
    for name, (size, key, value) in ways.items():
        logits = model(**inputs, voco_cache=changed(cache, key, value)).logits[chosen]
        difference = (logits - exact).abs()
        yield {
            "way": name, "tokens": tokens, "outliers": outliers, "bytes_per_value": size,
            "max_abs_logit": round(float(difference.max()), 4),
            "mean_abs_logit": round(float(difference.mean()), 5),
            "greedy_agreement": round(float((logits.argmax(-1) == exact.argmax(-1)).float().mean()), 4),
            "logit_std": round(float(exact.std()), 2), "positions": int(chosen.sum()),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--outliers", type=float, default=8.0)
    args = parser.parse_args()
    found = [row for f in (1.0, args.outliers) for k in (1, 4) for row in measure(args.images, k, f)]
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
