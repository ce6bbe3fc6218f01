"""An hour of video on a GPU: 3,600 frames of 256 tokens, compressed to 2 each, then a question over all.

    python benchmarks/gpu/long_video.py --out long_video.json                    # LLaVA-1.5-7B's sizes, bf16
    python benchmarks/gpu/long_video.py --device cpu --shape tiny --dtype float32 --frames 8     # seconds

Frames a second and peak memory of stage 1 (reading and resizing frames left out), seconds of stage 2 beside
its floor, bytes of the cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from voco_plugin.benchmark.long_video import long_video
from voco_plugin.benchmark.result_file import DTYPES, check_device, record, write
from voco_plugin.benchmark.shapes import SHAPES


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="vicuna7b")
    parser.add_argument("--frames", type=int, default=3600)
    parser.add_argument("--num-tokens", type=int, default=2, help="VoCo tokens a frame")
    parser.add_argument("--batch", type=int, default=64, help="frames given to stage 1 at a time")
    parser.add_argument("--max-memory", type=int, help="bytes that one forward of stage 1 may take")
    parser.add_argument("--text", type=int, default=64, help="tokens of the question")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args(argv)
    try:
        check_device(args.device)
    except ValueError as problem:
        parser.error(str(problem))
    names = ("frames", "shape", "num_tokens", "batch", "text", "repeats", "max_memory")
    settings = {name: getattr(args, name) for name in names}
    figures = long_video(device=args.device, dtype=args.dtype, **settings)
    options = [f"--{k.replace('_', '-')} {v}" for k, v in settings.items() if v is not None]
    command = " ".join(["python benchmarks/gpu/long_video.py", *options])
    command += f" --device {args.device} --dtype {args.dtype}"
    result = record(
        "long_video", figures, command=command, device=args.device, dtype=args.dtype, shape=args.shape
    )
    if args.out:
        write(result, args.out)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
