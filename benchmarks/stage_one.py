"""Stage 1 measured: speed against plain prefill of the same tokens, and peak memory in the number of images.

    python benchmarks/stage_one.py --out stage_one.json
    python benchmarks/stage_one.py --device cuda --shape vicuna7b --dtype bfloat16 --out stage_one_gpu.json

`speed`: `model.compress` of a batch of images against the plain model's forward over the same tokens
(`[vision, VoCo]` of each image, keys and values of all of them kept), in one process, in turn, as medians.
Both do the same work in the vision tower; `text` gives both the same ready features instead, so that the
language model's part is seen. Above 1, compressing is the faster.

`memory`: images streamed through `compress_images`, a fresh process for each number of them: the peak on top
of the loaded model, and the estimate by which `max_memory` cuts (`cache/memory.py`).

Sizes come from the environment too: STAGE_ONE_BATCH, STAGE_ONE_REPEATS, STAGE_ONE_COUNTS (10,100,1000).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voco_plugin.benchmark.shapes import SHAPES, batch_of, build, pair


def stage_one_ratio(
    plain: Any, attached: Any, inputs: dict[str, Any], *, repeats: int = 10, tower: bool = True
) -> dict[str, Any]:
    """Images a second of compressing ``inputs`` and of plain prefill over them, and their ratios.

    Args:
        plain, attached: the same weights without and with VoCo.
        inputs: one image a row, VoCo tokens in place.
        tower: whether the vision tower runs; else both get its features ready-made.

    Returns:
        seconds by way (medians), images a second, and ``ratio`` = compress over prefill, with the LM head on
        the last token only and on all.
    """
    import torch

    from voco_plugin.benchmark import interleaved_medians
    from voco_plugin.benchmark.timing import synchronised

    images = len(inputs["input_ids"])
    device = inputs["input_ids"].device

    def timed(call: Any) -> Any:
        return synchronised(lambda: call, device)

    ways = {
        "compress": timed(lambda: attached.compress(**inputs)),
        "prefill": timed(lambda: plain(**inputs, use_cache=True, logits_to_keep=1)),
        "prefill, all logits": timed(lambda: plain(**inputs, use_cache=True)),
    }
    with torch.no_grad(), _ready_features((plain, attached), inputs, not tower):
        seconds = interleaved_medians(ways, repeats, warm_up=2)
    speed = {name: images / value for name, value in seconds.items()}
    return {
        "images": images, "tokens": inputs["input_ids"].shape[1], "tower": tower, "repeats": repeats,
        "seconds": seconds, "images_per_second": speed,
        "ratio": speed["compress"] / speed["prefill"],
        "ratio_all_logits": speed["compress"] / speed["prefill, all logits"],
    }  # fmt: skip


class _ready_features:
    """While open, the models' ``get_image_features`` gives features computed before."""

    def __init__(self, models: tuple[Any, ...], inputs: dict[str, Any], on: bool) -> None:
        self.backbones = [m.model for m in models] if on else []
        self.pixels = inputs["pixel_values"]

    def __enter__(self) -> None:
        for backbone in self.backbones:
            ready = backbone.get_image_features(pixel_values=self.pixels, return_dict=True)
            backbone.get_image_features = lambda *args, ready=ready, **kwargs: ready

    def __exit__(self, *problem: Any) -> None:
        for backbone in self.backbones:
            del backbone.get_image_features


_TRIMMED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

# -- memory
# ------------------------------------------------------------------------------------------------------------


def peak_memory(
    count: int, *, device: str = "cpu", shape: str = "tiny", batch: int = 8, max_memory: int | None = None
) -> dict[str, Any]:
    """Peak bytes, on top of the loaded model, while ``count`` images stream through ``compress_images``; in a
    process of its own.

    glibc is told to give freed blocks back at once, so that the resident set follows what is held.
    """
    command = [sys.executable, __file__, "--child", str(count), "--device", device, "--batch", str(batch)]
    command += ["--memory-shape", shape]
    if max_memory is not None:
        command += ["--max-memory", str(max_memory)]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    out = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **_TRIMMED, "PYTHONPATH": path},
    )
    return json.loads(out.stdout.splitlines()[-1])


def _child(args: argparse.Namespace) -> dict[str, Any]:
    """What ``peak_memory`` runs: build, warm up on one image, count from there."""
    import numpy as np
    import torch
    from PIL import Image

    import voco_plugin as vp
    from voco_plugin.benchmark.peak_memory import peak, reset_peak
    from voco_plugin.cache.compress.memory import working_memory
    from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm
    from voco_plugin.inference.answering import compress_images

    wide = {"tiny": 128, "wide": 512}[args.memory_shape]
    model, processor = build_tiny_vlm(
        image_size=112, patch_size=8, vision_width=wide // 2, text_width=wide, text_layers=4, text_heads=4
    )
    model = vp.attach(model.eval().to(args.device), vp.VoCoConfig(num_tokens=2), processor=processor)

    def images(count: int) -> Iterator[Any]:
        draw = np.random.default_rng(0)
        for _ in range(count):
            yield Image.fromarray(draw.integers(0, 255, (112, 112, 3), dtype=np.uint8))

    for _ in compress_images(model, processor, images(1), batch_size=1):
        pass
    before = reset_peak(args.device)
    kept = 0
    for cache in compress_images(
        model, processor, images(args.child), batch_size=args.batch, max_memory=args.max_memory
    ):
        kept += cache.nbytes
        tokens = cache.blocks[0].num_vision + cache.blocks[0].num_tokens
    return {
        "images": args.child, "batch": args.batch, "device": args.device, "tokens": tokens,
        "peak_bytes": peak(args.device) - before, "cache_bytes": kept, "max_memory": args.max_memory,
        "estimate_bytes": working_memory(model, tokens, 2, 3 * 112 * 112, rows=args.batch),
        "torch": torch.__version__,
    }  # fmt: skip


# -- the command
# ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    environment = os.environ.get
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="write the JSON here, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--batch", type=int, default=int(environment("STAGE_ONE_BATCH", "4")))
    parser.add_argument("--repeats", type=int, default=int(environment("STAGE_ONE_REPEATS", "10")))
    parser.add_argument("--num-tokens", type=int, default=2)
    parser.add_argument("--counts", default=environment("STAGE_ONE_COUNTS", "10,100,1000"))
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--max-memory", type=int)
    parser.add_argument("--memory-shape", choices=("tiny", "wide"), default="tiny")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child is not None:
        print(json.dumps(_child(args)))
        return 0
    found: dict[str, Any] = {"shape": args.shape, "device": args.device, "dtype": args.dtype}
    if args.only != "memory":
        import torch

        found["threads"] = torch.get_num_threads()
        if args.device != "cpu":
            found["device_name"] = torch.cuda.get_device_name()
        plain, attached = pair(build(args.shape, args.device, args.dtype))
        inputs = batch_of(plain, args.batch, args.num_tokens)
        found["speed"] = [
            stage_one_ratio(plain, attached, inputs, repeats=args.repeats, tower=tower)
            for tower in (True, False)
        ]
    if args.only != "speed":
        counts = [int(part) for part in args.counts.split(",")]
        found["memory"] = [
            peak_memory(n, device=args.device, shape=args.memory_shape, max_memory=args.max_memory)
            for n in counts
        ]
    text = json.dumps(found, indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
