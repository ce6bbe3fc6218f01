"""Caches measured: time to the first token, compression, the store, bytes and memory; one JSON file.

    python benchmarks/cache.py --out docs/results/cache.json                                        # CPU
    python benchmarks/cache.py --device cuda --shape vicuna7b --dtype bfloat16 --out cache_gpu.json
    python benchmarks/cache.py --quick                                                              # seconds

`first_token`: seconds to the first token of an answer, ways alternately in one process, medians, as ratios of
the floor. All ways run the same weights and give the logits of the last token:

    floor         plain prefill of a text as long as stage 2's stream: no image at all
    VoCo          stage 2: cached blocks are placed (moved to where the prompt wants them), the text is read
    full caching  the keys and values of all vision tokens are there, the text is read behind them
    no cache      vision tower, vision tokens and text

`decode` is whole answers, with a dynamic, a static and a compiled static KV cache.
`images_in_a_prompt` is the same with 1, 8 and 64 cached images in one prompt, against the floor alone.
`stage_one` and `memory` are benchmarks/stage_one.py's. `store` compares records with raw safetensors files.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import stage_one

from voco_plugin.benchmark import shapes
from voco_plugin.benchmark.inference import first_token, images_in_a_prompt
from voco_plugin.benchmark.timing import synchronised

PACKAGES = ("torch", "transformers", "safetensors", "lmdb")


def decode(plain: Any, attached: Any, *, new_tokens: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of whole answers of ``new_tokens``: from a text of the stream's length (the floor), from a
    cache with a dynamic and a static KV cache, and with the static one compiled (after compiling).
    """
    import torch
    from transformers import CompileConfig

    from voco_plugin.benchmark import interleaved_medians

    inputs = shapes.prompt(plain, 32, num_tokens, rows=1)
    compiled = CompileConfig(mode="default" if plain.device.type == "cpu" else "reduce-overhead")
    compiled._compile_all_devices = True
    with torch.no_grad():
        cache, stream = attached.compress(**inputs), attached.stream_inputs(inputs)
        words = torch.randint(5, 30000, stream["input_ids"].shape).to(plain.device)
        new = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        static = {"cache_implementation": "static", "max_cache_len": 64 + new_tokens}
        given = {**stream, "voco_cache": cache, **new}
        ways = {
            "floor": lambda: (
                lambda: plain.generate(input_ids=words, attention_mask=torch.ones_like(words), **new)
            ),
            "VoCo, dynamic": lambda: lambda: attached.generate(**given),
            "VoCo, static": lambda: lambda: attached.generate(**given, **static, disable_compile=True),
            "VoCo, static, compiled": lambda: (
                lambda: attached.generate(**given, **static, compile_config=compiled)
            ),
        }
        timed = {name: synchronised(way, plain.device) for name, way in ways.items()}
        seconds = interleaved_medians(timed, repeats, warm_up=2)
    return {
        "new_tokens": new_tokens, "seconds": seconds,
        "ratio_to_floor": {name: value / seconds["floor"] for name, value in seconds.items()},
    }  # fmt: skip


# -- the store


def store(records: int, *, layers: int, heads: int, dim: int, num_tokens: int, dtype: str) -> dict[str, Any]:
    """Records a second, written and read one by one and all at once, beside files of the same tensors.

    `raw` is safetensors' own `save_file` and `load_file`: no checksum, not flushed. `saved` is
    `VoCoCache.save` and `load`: checksum, flushed, renamed. `store` flushes once a put, `put_many` once in
    all.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from voco_plugin import VoCoBlock, VoCoCache, VoCoCacheStore

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    made_by = {"model": "m", "adapter": "none", "num_tokens": num_tokens, "dtype": dtype}
    caches, keys = [], [f"{i:064x}" for i in range(records)]
    for _ in range(records):
        keep = torch.randn(2, layers, heads, num_tokens, dim).to(kind)
        block = VoCoBlock(tuple(keep[0]), tuple(keep[1]), 0, 576, 576)
        caches.append(VoCoCache([block], fingerprint=made_by))
    tensors = [
        {f"{n}.{i}": t for n in ("keys", "values") for i, t in enumerate(getattr(c.blocks[0], n))}
        for c in caches
    ]
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "raw").mkdir()
        with VoCoCacheStore(folder / "store", fingerprint=made_by) as one:
            ways = {
                "raw write": lambda i: save_file(tensors[i], folder / "raw" / keys[i]),
                "saved write": lambda i: caches[i].save(folder / "saved" / keys[i]),
                "store put": lambda i: one.put(keys[i], caches[i]),
            }
            _in_turn(ways, records, times)
            ways = {
                "raw read": lambda i: load_file(folder / "raw" / keys[i]),
                "saved read": lambda i: VoCoCache.load(folder / "saved" / keys[i]),
                "store get": lambda i: one.get(keys[i]),
            }
            _in_turn(ways, records, times)
            with one.view() as view:
                _in_turn({"store view": lambda i: view[keys[i]]}, records, times)
            size = one.stat()
        with VoCoCacheStore(folder / "many", fingerprint=made_by) as many:
            start = time.perf_counter()
            many.put_many(zip(keys, caches, strict=True))
            together = time.perf_counter() - start
        with VoCoCacheStore(folder / "small", fingerprint=made_by, values="int8") as small:
            small.put_many(zip(keys, caches, strict=True))
            int8 = small.stat()["bytes"] / records
    a_second = {name: 1 / statistics.median(values) for name, values in times.items()}
    a_second["store put_many"] = records / together
    return {
        "records": records, "block": f"{layers} layers, {heads} heads, K {num_tokens}, D {dim}, {dtype}",
        "a_second": a_second, "values_bytes": caches[0].nbytes, "record_bytes": size["bytes"] / records,
        "record_bytes_int8": int8,
    }  # fmt: skip


def _in_turn(ways: dict[str, Callable[[int], Any]], records: int, times: dict[str, list[float]]) -> None:
    order = random.Random(0)
    for index in range(records):
        for name in order.sample(list(ways), len(ways)):
            start = time.perf_counter()
            ways[name](index)
            times.setdefault(name, []).append(time.perf_counter() - start)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="small")
    parser.add_argument("--num-tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--counts", default="10,100,1000", help="images of the memory points")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.records, args.counts = 2, 5, "2,4"

    import torch

    model = shapes.build(args.shape, args.device, args.dtype)
    plain, attached = shapes.pair(model)
    text = model.config.text_config
    shape = {
        "layers": text.num_hidden_layers, "heads": text.num_key_value_heads,
        "dim": text.hidden_size // text.num_attention_heads,
    }  # fmt: skip
    full = 2 * shape["layers"] * shape["heads"] * shape["dim"] * torch.finfo(model.dtype).bits // 8
    found: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/cache.py", *(argv if argv is not None else sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "shape": {"name": args.shape, "dtype": args.dtype, "hidden": text.hidden_size, **shape},
        "bytes_an_image": {
            "VoCo": full * args.num_tokens, "all vision tokens": full * shapes.VISION_TOKENS,
        },
    }  # fmt: skip
    batches = [(1, 32), (1, 128), (4, 32)] if not args.quick else [(1, 8)]
    found["first_token"] = [
        first_token(plain, attached, text=tokens, num_tokens=args.num_tokens, rows=rows, repeats=args.repeats)
        for rows, tokens in batches
    ]
    found["images_in_a_prompt"] = [
        images_in_a_prompt(
            plain, attached, images=n, text=32, num_tokens=args.num_tokens, repeats=args.repeats
        )
        for n in ((1, 8, 64) if not args.quick else (2,))
    ]
    if not args.quick:
        found["decode"] = decode(
            plain, attached, new_tokens=32, num_tokens=args.num_tokens, repeats=max(args.repeats // 3, 3)
        )
    rows = 4 if not args.quick else 1
    batch = shapes.batch_of(plain, rows, args.num_tokens)
    found["stage_one"] = [
        stage_one.stage_one_ratio(plain, attached, batch, repeats=args.repeats, tower=tower)
        for tower in (True, False)
    ]
    del model, plain, attached
    found["store"] = [
        store(args.records, **shape, num_tokens=args.num_tokens, dtype=args.dtype),
        store(args.records, layers=32, heads=32, dim=128, num_tokens=1, dtype="float16"),
    ]
    found["memory"] = [stage_one.peak_memory(int(n), device=args.device) for n in args.counts.split(",")]
    text_out = json.dumps(found, indent=1)
    if args.out:
        args.out.write_text(text_out + "\n", encoding="utf-8")
    print(text_out)
    return found


if __name__ == "__main__":
    main()
