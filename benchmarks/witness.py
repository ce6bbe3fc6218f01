"""What it costs to notice that weights were written to, in front of every first token of stage 2.

    python benchmarks/witness.py            # the tensors of LLaVA-1.5-7B, at an eighth of their width
    python benchmarks/witness.py --width 1  # at their width: 14 GB
    python benchmarks/witness.py --device cuda

A: what is asked of the modules and tensors (which are there, which were written to). B: A and the values of
the witness. Both in turns in one process; medians in ms, and their difference against the least that a 7B
model's first token can take: its 13.5 GB of weights, read once at the device's rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from voco_plugin.cache.seen import Seen

RATES = {"NVIDIA H200": 4.8e12, "NVIDIA H100": 3.35e12, "a CPU with two channels of memory": 40e9}
"""Bytes a second that are read from memory, as the makers state them."""
WEIGHTS = 13.5e9


def model_of(width: int, device: str) -> torch.nn.Module:
    text = LlamaConfig(
        hidden_size=4096 // width, intermediate_size=11008 // width, num_hidden_layers=32,
        num_attention_heads=32, head_dim=128 // width, vocab_size=32064,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024 // width, intermediate_size=4096 // width, num_hidden_layers=24,
        num_attention_heads=16, image_size=336, patch_size=14,
    )  # fmt: skip
    with torch.device(device):
        made = AutoModelForImageTextToText.from_config(
            LlavaConfig(text_config=text, vision_config=vision), dtype=torch.bfloat16
        )
    return made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=8, help="divides every width (default 8)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=101)
    args = parser.parse_args()
    model = model_of(args.width, args.device)
    with_values, without = Seen(model, 5), Seen(model, 5)
    without.witness.same = lambda tensors: True  # type: ignore[method-assign, union-attr]
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(args.runs):
        for name, seen in (("without", without), ("with", with_values)):
            start = time.perf_counter()
            assert seen.still(model, 5)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(found) * 1e3 for name, found in seconds.items()}
    cost = median["with"] - median["without"]
    print(
        json.dumps(
            {
                "tensors": len([*model.parameters()]),
                "device": args.device,
                "torch": torch.__version__,
                "ms": {name: round(value, 3) for name, value in median.items()},
                "witness_ms": round(cost, 3),
                "floor_ms": {name: round(WEIGHTS / rate * 1e3, 1) for name, rate in RATES.items()},
                "share_of_floor": {n: round(cost / (WEIGHTS / r * 1e3), 4) for n, r in RATES.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
