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
import copy
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

PACKAGES = ("torch", "transformers", "safetensors", "lmdb")
BEFORE = 8
"""Text tokens before the image."""


def prompt(model: Any, text: int, num_tokens: int, rows: int, images: int = 1) -> dict[str, Any]:
    """``rows`` prompts ``[8 text, (vision, VoCo) x images, text]``, random ids and pixels."""
    import torch

    draw = torch.Generator().manual_seed(1)
    block = torch.full((rows, stage_one.VISION_TOKENS + num_tokens), stage_one.IMAGE)
    block[:, stage_one.VISION_TOKENS :] = stage_one.VOCO
    parts = [torch.randint(5, 30000, (rows, n), generator=draw) for n in (BEFORE, text)]
    ids = torch.cat([parts[0], *[block] * images, parts[1]], dim=1)
    side = stage_one.IMAGE_SIZE
    pixels = torch.randn(rows * images, 3, side, side, generator=draw).to(model.dtype)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in batch.items()}


def first_token(
    plain: Any, attached: Any, *, text: int, num_tokens: int, rows: int, repeats: int
) -> dict[str, Any]:
    """Median seconds of each way, and what torch counts as their FLOPs."""
    import torch

    from voco_plugin.benchmark import interleaved_medians

    inputs = prompt(plain, text, num_tokens, rows)
    without = inputs["input_ids"] != stage_one.VOCO
    ids = inputs["input_ids"][without].view(rows, -1)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    end = BEFORE + stage_one.VISION_TOKENS
    with torch.no_grad():
        past = plain(
            input_ids=ids[:, :end], attention_mask=whole["attention_mask"][:, :end],
            pixel_values=whole["pixel_values"], use_cache=True,
        ).past_key_values  # fmt: skip
        # compressed alone, so that every block has to move
        alone = {"input_ids": inputs["input_ids"][:, BEFORE : end + num_tokens]}
        cache = attached.compress(**alone, pixel_values=inputs["pixel_values"])
        stream = attached.stream_inputs(inputs)
        shape = stream["input_ids"].shape
        words = torch.randint(5, 30000, shape, generator=torch.Generator().manual_seed(2)).to(plain.device)
        asked = {"input_ids": ids[:, end:], "attention_mask": whole["attention_mask"]}
        last = {"use_cache": True, "logits_to_keep": 1}

        def full() -> Callable[[], Any]:
            own = copy.deepcopy(past)  # a forward appends to it
            return lambda: plain(**asked, past_key_values=own, **last)

        floor = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        ways: dict[str, Callable[[], Callable[[], Any]]] = {
            "floor": lambda: lambda: plain(**floor, **last),
            "VoCo": lambda: lambda: attached(**stream, voco_cache=cache, logits_to_keep=1),
            "full caching": full,
            "no cache": lambda: lambda: plain(**whole, **last),
        }
        ways["VoCo"]()()  # the first time a model moves a block it looks at how its layers rotate
        flops = {name: _flops(way()) for name, way in ways.items()}
        timed = {name: _synchronised(way, plain.device) for name, way in ways.items()}
        seconds = interleaved_medians(timed, repeats)
    return {
        "rows": rows, "text_tokens": text, "stream_tokens": shape[1], "num_tokens": num_tokens,
        "seconds": seconds, "flops": flops,
        "ratio_to_floor": {name: value / seconds["floor"] for name, value in seconds.items()},
    }  # fmt: skip


def images_in_a_prompt(
    plain: Any, attached: Any, *, images: int, text: int, num_tokens: int, repeats: int
) -> dict[str, Any]:
    """Stage 2 with many cached images in one prompt, against plain prefill of a text of that length."""
    import torch

    from voco_plugin import VoCoCache
    from voco_plugin.benchmark import interleaved_medians

    one = prompt(plain, text, num_tokens, rows=1)
    ids = one["input_ids"][0]
    end = BEFORE + stage_one.VISION_TOKENS + num_tokens
    with torch.no_grad():
        alone = attached.compress(input_ids=ids[None, BEFORE:end], pixel_values=one["pixel_values"])
        cache = VoCoCache.cat([alone.to(alone.blocks[0].dtype)] * images)  # as loaded apart
        voco = torch.full((num_tokens * images,), stage_one.VOCO, device=ids.device)
        stream = torch.cat([ids[:BEFORE], voco, ids[end:]])[None]
        words = torch.randint(5, 30000, stream.shape).to(ids.device)
        ways = {
            "floor": lambda: (
                lambda: plain(
                    input_ids=words, attention_mask=torch.ones_like(words), use_cache=True, logits_to_keep=1
                )
            ),
            "VoCo": lambda: lambda: attached(input_ids=stream, voco_cache=cache, logits_to_keep=1),
        }
        timed = {name: _synchronised(way, plain.device) for name, way in ways.items()}
        seconds = interleaved_medians(timed, repeats)
    return {
        "images": images, "stream_tokens": stream.shape[1], "seconds": seconds,
        "ratio_to_floor": seconds["VoCo"] / seconds["floor"],
    }  # fmt: skip


def decode(plain: Any, attached: Any, *, new_tokens: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of whole answers of ``new_tokens``: from a text of the stream's length (the floor), from a
    cache with a dynamic and a static KV cache, and with the static one compiled (after compiling).
    """
    import torch
    from transformers import CompileConfig

    from voco_plugin.benchmark import interleaved_medians

    inputs = prompt(plain, 32, num_tokens, rows=1)
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
        timed = {name: _synchronised(way, plain.device) for name, way in ways.items()}
        seconds = interleaved_medians(timed, repeats, warm_up=2)
    return {
        "new_tokens": new_tokens, "seconds": seconds,
        "ratio_to_floor": {name: value / seconds["floor"] for name, value in seconds.items()},
    }  # fmt: skip


def _flops(call: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _synchronised(way: Callable[[], Callable[[], Any]], device: Any) -> Callable[[], Callable[[], Any]]:
    if device.type != "cuda":
        return way
    import torch

    def made() -> Callable[[], Any]:
        call = way()

        def run() -> None:
            call()
            torch.cuda.synchronize()

        return run

    return made


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
    parser.add_argument("--shape", choices=tuple(stage_one.SHAPES), default="small")
    parser.add_argument("--num-tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--counts", default="10,100,1000", help="images of the memory points")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.records, args.counts = 2, 5, "2,4"

    import torch

    model = stage_one.build(args.shape, args.device, args.dtype)
    plain, attached = stage_one.pair(model)
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
            "VoCo": full * args.num_tokens, "all vision tokens": full * stage_one.VISION_TOKENS,
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
    batch = stage_one.batch_of(plain, rows, args.num_tokens)
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
