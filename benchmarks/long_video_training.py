"""One training step on a long video, dense against segmented: seconds and peak memory, as JSON.

    python benchmarks/long_video_training.py --frames 8,16,32,64 --out docs/results/long_video_training.json

Frames of 256 vision tokens and 2 VoCo tokens, 64 text tokens after them, a tiny VLM (4 layers, width 128)
with gradient checkpointing; each point in a process of its own, so that its peak is its own. A dense step
stores an N × N mask and its gradients' work; a point that needs more than `--memory` is stopped and named.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS, VOCO, TEXT = 256, 2, 64


def step(frames: int, attention: str, memory: int) -> dict[str, Any]:
    """One step in this process."""
    import torch

    import voco_plugin as vp
    from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm

    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    torch.manual_seed(0)
    model, processor = build_tiny_vlm(
        image_size=128, patch_size=8, vision_width=64, text_width=128, text_layers=4, text_heads=4
    )
    model = vp.attach(model, vp.VoCoConfig(num_tokens=VOCO, attention=attention), processor=processor)
    vocab = vp.attachment(model).vocab
    (image,) = vocab.placeholders
    block = [image] * TOKENS + [vocab.voco_id] * VOCO
    ids = torch.tensor([block * frames + [7] * TEXT])
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - TEXT, ids, -100)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "pixel_values": torch.randn(frames, 3, 128, 128),
    }  # fmt: skip
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    start = time.perf_counter()
    loss = model(**inputs).loss
    loss.backward()
    seconds = time.perf_counter() - start
    grad = sum(float(p.grad.double().pow(2).sum()) for p in model.parameters() if p.grad is not None)
    return {
        "frames": frames, "tokens": ids.shape[1], "attention": attention, "seconds": seconds,
        "peak_bytes": _status("VmHWM") - before, "loss": float(loss), "gradient_norm": grad**0.5,
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
    parser.add_argument("--frames", default="8,16,32,64")
    parser.add_argument("--attention", default="dense,segmented")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a step may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    limit = int(args.memory * 1e9)
    if args.child:
        print(json.dumps(step(int(args.child[0]), args.child[1], limit)))
        return {}
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    points = []
    for frames in map(int, args.frames.split(",")):
        for attention in args.attention.split(","):
            command = [
                sys.executable,
                __file__,
                "--memory",
                str(args.memory),
                "--child",
                str(frames),
                attention,
            ]
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["killed"])[-1]
                points.append({"frames": frames, "attention": attention, "failed": why[:200]})
            else:
                points.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(points[-1]), file=sys.stderr)
    found = {
        "command": "python benchmarks/long_video_training.py " + " ".join(argv or sys.argv[1:]),
        "memory_limit_gb": args.memory, "points": points,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
