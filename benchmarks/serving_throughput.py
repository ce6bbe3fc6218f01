"""The embedded engine beside two floors, in turns in one process.

    python benchmarks/serving_throughput.py MODEL --out serving_throughput.json
    python benchmarks/serving_throughput.py gridworld --requests 32 --concurrency 1 16

engine      a closed loop of prompts with a compressed image each, through continuous batching
text        the same engine and loop on plain text of the same number of tokens: what blocks cost
static      `model.generate` on batches of as many prompts with their caches, each batch as long as its
            longest answer: what continuous batching gains

Answers end after a length of their own (drawn once: uniform, 4 to `--longest` tokens, or exponential with a
mean of a quarter of that and cut there), whatever they say. Tokens a second; ratios are medians over turns.
`bound` is what a loop that never had an idle place would gain on static batches, in steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

import voco_plugin as vp
from voco_plugin.benchmark.result_file import environment
from voco_plugin.benchmark.timing import compare, interleaved_times
from voco_plugin.files import atomic_write_text
from voco_plugin.inference.answering import compress_images
from voco_plugin.inference.prompts import ask, stream_of
from voco_plugin.serving.engines.embedded.engine import EmbeddedEngine
from voco_plugin.serving.engines.embedded.manager import BatchLimits
from voco_plugin.serving.engines.request import EngineRequest, Sampling
from voco_plugin.serving.text_model import text_model_of


def prompts_of(model: Any, processor: Any, count: int) -> list[tuple[tuple[int, ...], Any]]:
    """Prompts with an image of noise each, and its cache."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    pixels = [
        torch.randint(256, (64, 64, 3), generator=draw, dtype=torch.uint8).numpy() for _ in range(count)
    ]
    caches = list(compress_images(model, processor, [Image.fromarray(one) for one in pixels]))
    found = []
    for number, cache in enumerate(caches):
        stream = stream_of(model, processor, [ask(f"What is at a{number % 9}? " * (1 + number % 3))], cache)
        found.append((tuple(stream["input_ids"][0].tolist()), cache))
    return found


def lengths_of(count: int, longest: int, kind: str) -> list[int]:
    draw = random.Random(0)
    if kind == "uniform":
        return [draw.randint(4, longest) for _ in range(count)]
    return [min(longest, 1 + int(draw.expovariate(4 / longest))) for _ in range(count)]


def bound_of(lengths: list[int], size: int) -> float:
    """Steps of static batches of ``size`` over those that the tokens need where no place is ever idle."""
    static = sum(max(lengths[begin : begin + size]) for begin in range(0, len(lengths), size))
    return static / max(sum(lengths) / size, max(lengths))


def in_engine(engine: EmbeddedEngine, requests: list[EngineRequest], concurrency: int) -> int:
    """All requests through a closed loop; tokens given."""

    async def run() -> int:
        waiting = iter(requests)
        tokens = 0

        async def work() -> None:
            nonlocal tokens
            for request in waiting:
                async for _ in engine.submit(request):
                    tokens += 1

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return tokens

    return asyncio.run(run())


@torch.no_grad()
def in_batches(model: Any, pad: int, prompts: Any, lengths: list[int], size: int) -> int:
    """The same with static batches; tokens wanted (what a batch gives beyond is waste)."""
    tokens = 0
    for begin in range(0, len(prompts), size):
        part, wanted = prompts[begin : begin + size], lengths[begin : begin + size]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.tensor([[pad] * (longest - len(one)) + list(one) for one, _ in part])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one, _ in part])
        model.generate(
            input_ids=ids, attention_mask=mask, voco_cache=vp.VoCoCache.stack([cache for _, cache in part]),
            max_new_tokens=max(wanted), eos_token_id=-1, do_sample=False,
        )  # fmt: skip
        tokens += sum(wanted)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, or a model that ships (gridworld)")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--lengths", choices=("uniform", "exponential"), default="uniform")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="JSON of the result")
    args = parser.parse_args()
    source = args.model
    if source == "gridworld":
        from voco_plugin.gridworld.shipped_demos import write_demo

        source = str(write_demo("gridworld", Path("runs/demo_gridworld")).model)
    model, processor = vp.load(source, device=args.device)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.eval()
    prompts, lengths = (
        prompts_of(model, processor, args.requests),
        lengths_of(args.requests, args.longest, args.lengths),
    )
    vocab = model._voco_attachment.vocab
    special = {vocab.voco_id, *vocab.placeholders, *vocab.markers}
    plain = [i for i in range(5, model.config.get_text_config().vocab_size) if i not in special]
    requests = [
        EngineRequest(ids, cache, (f"{n}",), Sampling(length, ignore_eos=True))
        for n, ((ids, cache), length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    draw = random.Random(1)
    texts = [
        EngineRequest(tuple(draw.choices(plain, k=len(r.ids))), vp.VoCoCache(), (), r.sampling)
        for r in requests
    ]
    wanted = sum(lengths)
    result: dict[str, Any] = {
        "model": Path(args.model).name, "requests": args.requests, "tokens": wanted, "lengths": args.lengths,
        "parameters": sum(p.numel() for p in model.parameters()), "levels": {},
    }  # fmt: skip
    pad = 0
    engine = EmbeddedEngine(model, text_model_of(model), BatchLimits(batch_requests=max(args.concurrency)))
    engine.start()
    try:
        for request in requests + texts:
            engine.check(request)
        for concurrency in args.concurrency:

            def run(what: str, concurrency: int = concurrency) -> Any:
                def timed() -> None:
                    if what == "static":
                        in_batches(model, pad, prompts, lengths, concurrency)
                    else:
                        given = in_engine(engine, requests if what == "engine" else texts, concurrency)
                        assert given == wanted, (given, wanted)

                return lambda: timed

            times = interleaved_times(
                {what: run(what) for what in ("text", "engine", "static")}, args.repeats, warm_up=1
            )
            found = compare(times, "engine")
            result["levels"][concurrency] = {
                "tokens_a_second": {what: wanted / found["seconds"][what] for what in times},
                "of_text": found["ratio"]["text"], "of_static": found["ratio"]["static"],
                "bound": bound_of(lengths, concurrency),
            }  # fmt: skip
            level = result["levels"][concurrency]
            print(
                f"{concurrency:3} at a time: {level['tokens_a_second']['engine']:8.0f} tokens a second; "
                f"{level['of_text']:.2f} of plain text's rate, {level['of_static']:.2f} of static batches' "
                f"(bound {level['bound']:.2f})"
            )
    finally:
        engine.stop()
    result["environment"] = environment(args.device)
    result["when"] = time.strftime("%Y-%m-%d")
    if args.out:
        atomic_write_text(args.out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
