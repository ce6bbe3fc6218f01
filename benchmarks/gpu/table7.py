"""Table 7 of the paper on a GPU: storage, first token, decoding, FLOPs, requests; the last line is JSON.

    python benchmarks/gpu/table7.py --out table7.json --plot table7.png      # LLaVA-1.5-7B, bf16, 80 GB
    python benchmarks/gpu/table7.py --device cpu --quick                     # seconds, to see that it runs

Takes every option of `voco bench inference`.
"""

from __future__ import annotations

import sys

from line import run

DEFAULTS = {"--device": "cuda", "--dtype": "bfloat16", "--shape": "vicuna7b", "--memory": "80GB"}

if __name__ == "__main__":
    sys.exit(run("inference", DEFAULTS, sys.argv[1:]))
