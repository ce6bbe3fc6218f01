"""Attention backends on a GPU, forward and backward; the last line is JSON.

    python benchmarks/gpu/attention.py --out attention.json --plot attention.png    # Vicuna-7B's heads, bf16
    python benchmarks/gpu/attention.py --device cpu --quick                         # seconds

Takes every option of `voco bench attention`; `--backends dense,segmented,flex` compares FlexAttention, too.
"""

from __future__ import annotations

import sys

from line import run

DEFAULTS = {"--device": "cuda", "--dtype": "bfloat16", "--heads": "32", "--head-dim": "128"}

if __name__ == "__main__":
    sys.exit(run("attention", DEFAULTS, sys.argv[1:]))
