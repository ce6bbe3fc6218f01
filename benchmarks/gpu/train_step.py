"""A training step of two layers of Vicuna-7B's sizes on a GPU; the last line is JSON.

    python benchmarks/gpu/train_step.py --out train.json --plot train.png
    python benchmarks/gpu/train_step.py --device cpu --quick                 # seconds, to see that it runs

Takes every option of `voco bench train`.
"""

from __future__ import annotations

import sys

from line import run

DEFAULTS = {"--device": "cuda", "--dtype": "bfloat16", "--shape": "vicuna7b"}

if __name__ == "__main__":
    sys.exit(run("train", DEFAULTS, sys.argv[1:]))
