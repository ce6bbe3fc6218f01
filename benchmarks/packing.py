"""Packed rows against padded batches: useful tokens a second of training, on conversations of mixed length.

    python benchmarks/packing.py --out docs/results/packing.json
    python benchmarks/packing.py --device cuda --dtype bfloat16 --rows 32 --out packing_gpu.json
    python benchmarks/packing.py --quick                                                           # seconds

A LLaVA of random weights, the same conversations for all ways: one pass over them is forward and backward of
every batch (no optimizer, no image decoding), ways in turn in one process, shuffled, medians of their ratios
in one turn:

    padded            batches of `--rows` conversations in random order, as the trainer draws them
    padded, sorted    conversations of like length together, as train_sampling_strategy=group_by_length does
    packed            first-fit decreasing into rows of `--max-length` tokens, as many rows a batch as make
                      about as many slots as a padded batch has

Text lengths are drawn log-normally (median 100, 95 % below 500), a third of the conversations have no image,
half have one, the rest two to four. A useful token is one that belongs to a conversation: padding is none.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import voco_plugin as vp
from voco_plugin.core.packed_rows import first_fit_decreasing, pack_batch

IMAGE, VOCO, PAD, VOCAB, PATCHES, K = 4, 5, 0, 2048, 64, 2
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4},
    "quick": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def build(shape: str, attention: str, device: str, dtype: str) -> Any:
    """A LLaVA with random weights and VoCo on; an image is 64 vision tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        image_size=32, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=VOCAB, pad_token_id=PAD, **SHAPES[shape])
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES
    )
    model = LlavaForConditionalGeneration(config).to(device, getattr(torch, dtype)).train()
    rule = vp.VoCoConfig(num_tokens=K, token_id=VOCO, attention=attention)
    return vp.attach(model, rule)


def conversations(count: int, longest: int, seed: int = 0) -> list[dict[str, Any]]:
    """``input_ids`` ``(n,)`` and ``pixel_values`` ``(images, 3, 32, 32)`` of each."""
    draw, made = random.Random(seed), []
    noise = torch.Generator().manual_seed(seed)
    for number in range(count):
        images = draw.choice((0, 0, 1, 1, 1, draw.randint(2, 4)))
        images = min(images, (longest - 8) // (PATCHES + K + 1))
        room = longest - images * (PATCHES + K) - 1
        text = min(max(4, int(draw.lognormvariate(4.6, 0.95))), room)
        words = torch.randint(10, VOCAB, (text,), generator=noise).tolist()
        ids = [words.pop()]
        for _ in range(images):
            ids += [IMAGE] * PATCHES + [VOCO] * K
            ids += [words.pop()] if words else []
        made.append(
            {
                "input_ids": torch.tensor(ids + words),
                "pixel_values": torch.randn(images, 3, 32, 32, generator=noise),
                "number": number,
            }
        )
    return made


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One batch, a row a conversation."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=PAD)
    real = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    silent = (real == 0) | (ids == IMAGE) | (ids == VOCO)
    batch = {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(silent, -100)}
    pixels = torch.cat([row["pixel_values"] for row in rows])
    return {**batch, "pixel_values": pixels} if len(pixels) else batch


def ways(rows: list[dict[str, Any]], size: int, max_length: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    """The batches of one pass over ``rows``, by way."""
    lengths = [len(row["input_ids"]) for row in rows]
    order = random.Random(1).sample(range(len(rows)), len(rows))
    like = sorted(order, key=lambda i: lengths[i])
    cut = lambda found: [found[i : i + size] for i in range(0, len(found), size)]  # noqa: E731
    plain = {"padded": cut(order), "padded, sorted": cut(like)}
    made = {name: [padded([rows[i] for i in part]) for part in parts] for name, parts in plain.items()}
    groups = first_fit_decreasing(lengths, max_length)
    random.Random(2).shuffle(groups)
    # as many packed rows a batch as make about as many slots as a padded batch has
    slots = statistics.mean(batch["input_ids"].numel() for batch in made["padded"])
    together = max(1, round(slots / max_length))
    made["packed"] = []
    for at in range(0, len(groups), together):
        part = groups[at : at + together]
        batch = padded([rows[i] for group in part for i in group])
        made["packed"].append(pack_batch(batch, [len(group) for group in part], pad_token_id=PAD))
    return made


def one_pass(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Forward and backward of every batch; the sum of the token losses."""
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        total += float(loss.detach()) * int((batch["labels"][:, 1:] != -100).sum())
        model.zero_grad(set_to_none=True)
    return total


def measure(
    model: Any, made: dict[str, list[dict[str, torch.Tensor]]], useful: int, repeats: int, device: str
) -> dict[str, Any]:
    """Each way's figures, and the median of its speed over that of ``padded`` in the same turn."""
    on = {name: [{k: v.to(device) for k, v in b.items()} for b in batches] for name, batches in made.items()}
    for batches in on.values():
        for batch in batches:
            batch["pixel_values"] = batch.get("pixel_values", torch.zeros(0)).to(model.dtype)
            if not len(batch["pixel_values"]):
                del batch["pixel_values"]
    wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in on}
    losses: dict[str, float] = {}
    draw = random.Random(0)
    for turn in range(repeats + 1):
        for name in draw.sample(list(on), len(on)):
            wait()
            start = time.perf_counter()
            losses[name] = one_pass(model, on[name])
            wait()
            if turn:
                times[name].append(time.perf_counter() - start)
    base = times["padded"]
    return {
        name: {
            "batches": len(batches),
            "slots": sum(b["input_ids"].numel() for b in batches),
            "filled": round(useful / sum(b["input_ids"].numel() for b in batches), 4),
            "useful_tokens_a_second": round(useful / statistics.median(times[name])),
            "ratio_to_padded": round(
                statistics.median(b / t for b, t in zip(base, times[name], strict=True)), 3
            ),
            "loss_sum": losses[name],
        }
        for name, batches in on.items()
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file; printed in any case")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=8, help="conversations of a padded batch")
    parser.add_argument("--count", type=int, default=96, help="conversations")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    if args.quick:
        args.count, args.repeats, args.max_length = 16, 1, 512
    rows = conversations(args.count, args.max_length)
    useful = sum(len(row["input_ids"]) for row in rows)
    made = ways(rows, args.rows, args.max_length)
    found: dict[str, Any] = {
        "command": " ".join(["python benchmarks/packing.py", *(arguments or sys.argv[1:])]),
        "machine": f"{args.device}, {platform.machine()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "conversations": args.count,
        "useful_tokens": useful,
        "longest": max(len(row["input_ids"]) for row in rows),
        "max_length": args.max_length,
        "repeats": args.repeats,
        "attention": {},
    }
    for attention in ("dense", "segmented"):
        model = build("quick" if args.quick else "tiny", attention, args.device, args.dtype)
        found["attention"][attention] = measure(model, made, useful, args.repeats, args.device)
    text = json.dumps(found, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
