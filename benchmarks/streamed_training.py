"""One training step on a video, stage 1 joint with the text or streamed: seconds and peak memory, as JSON.

    python benchmarks/streamed_training.py --frames 8,16,32,64,128 --out docs/results/streamed_training.json

Frames of 256 vision tokens and 2 VoCo tokens, 64 text tokens after them, a tiny VLM (4 layers, width 128)
with gradient checkpointing, every weight trained. `joint` is one pass under the rule with segmented
attention; `streamed` runs chunks of `--chunk` frames first. Each point is a process of its own, so that its
peak is its own; what a step needs beside its activations (pixels, weights) is there before it is measured,
gradients are not. glibc is told to give back what is freed (MALLOC_MMAP_THRESHOLD_): left alone it raises the
limit with the largest piece freed, keeps chunks in its heap, and the peak is then its own (docs/video.md).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS, VOCO, TEXT = 256, 2, 64


def step(frames: int, stage1: str, chunk: int, repeats: int) -> dict[str, Any]:
    """Steps in this process; the first one's memory, the median of their seconds."""
    import statistics

    import torch
    from trl.trainer.utils import add_fused_lm_head

    import voco_plugin as vp
    from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm
    from voco_plugin.training.fused_step import take_off_fused_forward
    from voco_plugin.training.two_stage.layer_checkpointing import can_checkpoint_with_cache
    from voco_plugin.training.two_stage.trainer_part import Streamed

    torch.manual_seed(0)
    model, processor = build_tiny_vlm(
        image_size=128, patch_size=8, vision_width=64, text_width=128, text_layers=4, text_heads=4
    )
    config = vp.VoCoConfig(num_tokens=VOCO, attention="segmented" if stage1 == "joint" else "auto")
    model = vp.attach(model, config, processor=processor)
    add_fused_lm_head(model)
    step = take_off_fused_forward(model, None)
    can_checkpoint_with_cache(model)
    vocab = vp.attachment(model).vocab
    (image,) = vocab.placeholders
    ids = torch.tensor([([image] * TOKENS + [vocab.voco_id] * VOCO) * frames + [7] * TEXT])
    labels = torch.where(torch.arange(ids.shape[1]) > ids.shape[1] - TEXT, ids, -100)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "pixel_values": torch.randn(frames, 3, 128, 128),
    }  # fmt: skip
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = step if stage1 == "joint" else Streamed(chunk, step)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    peak, seconds = 0, []
    for _ in range(repeats):
        model.zero_grad()
        start = time.perf_counter()
        loss = model(**inputs, fused_lm_head=True, training_step=step).loss
        loss.backward()
        seconds.append(time.perf_counter() - start)
        peak = peak or _status("VmHWM") - before
    grad = sum(float(p.grad.double().pow(2).sum()) for p in model.parameters() if p.grad is not None)
    return {
        "frames": frames, "tokens": ids.shape[1], "stage1": stage1,
        "seconds": statistics.median(seconds), "peak_bytes": peak, "loss": loss.item(),
        "gradient_norm": grad**0.5,
    }  # fmt: skip


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", default="8,16,32,64,128")
    parser.add_argument("--chunk", type=int, default=4, help="frames a chunk of streamed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(step(int(args.child[0]), args.child[1], args.chunk, args.repeats)))
        return {}
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ, "PYTHONPATH": path}
    points = []
    for frames in map(int, args.frames.split(",")):
        for stage1 in ("joint", "streamed"):
            own = ["--chunk", str(args.chunk), "--repeats", str(args.repeats)]
            command = [sys.executable, __file__, *own, "--child", str(frames), stage1]
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["killed"])[-1]
                points.append({"frames": frames, "stage1": stage1, "failed": why[:200]})
            else:
                points.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(points[-1]), file=sys.stderr)
    from importlib.metadata import version

    found = {
        "command": "python benchmarks/streamed_training.py " + " ".join(argv or sys.argv[1:]),
        "chunk": args.chunk, "torch": version("torch"), "transformers": version("transformers"),
        "points": points,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
