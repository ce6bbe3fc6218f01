"""A store against raw safetensors files: puts and gets a second, bytes an image.

    python benchmarks/store.py [--layers 32 --heads 32 --dim 128 --tokens 1 --dtype float16] [--images 300]

Blocks of random values (the default is what LLaVA-1.5-7B keeps of an image), written one by one and in
batches of 32, each on the disk when the call returns. The raw files are what a script would write: one
``safetensors.torch.save_file`` an image, without checksum, metadata or fsync; and ``VoCoCache.save``, which
has all three. Reads are from the page cache, in random order. One JSON value on stdout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import voco_plugin as vp

MADE_BY = {"model": "random", "adapter": "none", "processor": "none", "num_tokens": 1}


def made(seed: int, args: argparse.Namespace) -> vp.VoCoCache:
    generator = torch.Generator().manual_seed(seed)
    shape = (args.layers, args.heads, args.tokens, args.dim)
    dtype = getattr(torch, args.dtype)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return vp.VoCoCache([vp.VoCoBlock(tuple(keys), tuple(values), 5, 576, 576)], fingerprint=MADE_BY)


def per_second(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return round(count / (time.perf_counter() - start), 1)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """All figures, for ``args.images`` blocks."""
    caches = [made(seed, args) for seed in range(min(args.images, 32))]
    caches = [caches[n % len(caches)] for n in range(args.images)]
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(args.images)]
    order = random.Random(0).sample(range(args.images), args.images)
    raw = [
        {f"{w}.{n}": t for w in ("keys", "values") for n, t in enumerate(getattr(c.blocks[0], w))}
        for c in caches
    ]
    out: dict = {"images": args.images, "block_bytes": caches[0].nbytes}

    def each(work: Callable[[int], object], numbers=range(args.images)) -> Callable[[], object]:
        return lambda: [work(n) for n in numbers]

    def touched(cache: vp.VoCoCache) -> float:
        return sum(float(t.reshape(-1)[0]) for t in cache.blocks[0].keys)

    for name in ("raw", "save"):
        (folder / name).mkdir()
    out["put"] = {
        "raw files": per_second(
            args.images, each(lambda n: save_file(raw[n], folder / "raw" / f"{n}.safetensors"))
        ),
        "VoCoCache.save": per_second(
            args.images, each(lambda n: caches[n].save(folder / "save" / f"{n}.safetensors"))
        ),
    }
    out["get"] = {
        "raw files": per_second(
            args.images, each(lambda n: load_file(folder / "raw" / f"{n}.safetensors"), order)
        ),
        "VoCoCache.load": per_second(
            args.images, each(lambda n: vp.VoCoCache.load(folder / "save" / f"{n}.safetensors"), order)
        ),
    }
    out["bytes_per_image"] = {"VoCoCache.save": os.path.getsize(folder / "save" / "0.safetensors")}
    for values in ("keep", "int8"):
        with vp.VoCoCacheStore(folder / f"{values}1", fingerprint=MADE_BY, values=values) as store:
            out["put"][f"store {values}, one by one"] = per_second(
                args.images, each(lambda n, s=store: s.put(keys[n], caches[n]))
            )
        with vp.VoCoCacheStore(folder / values, fingerprint=MADE_BY, values=values) as store:
            batches = range(0, args.images, 32)
            out["put"][f"store {values}, 32 at once"] = per_second(
                args.images,
                each(
                    lambda n, s=store: s.put_many(zip(keys[n : n + 32], caches[n : n + 32], strict=True)),
                    batches,
                ),
            )
            out["get"][f"store {values}"] = per_second(
                args.images, each(lambda n, s=store: s.get(keys[n]), order)
            )
            with store.view() as view:
                out["get"][f"store {values}, view"] = per_second(
                    args.images, each(lambda n, v=view: touched(v[keys[n]]), order)
                )
            out["bytes_per_image"][f"store {values}"] = round(store.stat()["bytes"] / args.images)
            out["bytes_per_image"][f"store {values}, file"] = round(store.stat()["file_bytes"] / args.images)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("layers", 32), ("heads", 32), ("dim", 128), ("tokens", 1), ("images", 300)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--folder", default=None, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args, Path(folder))
    sys.stdout.write(json.dumps({**vars(args), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
