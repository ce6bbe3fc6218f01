"""Table 7 of the paper as one result: storage, first token, decoding, FLOPs, requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import shapes
from .inference import PAPER, counted_flops, first_token, storage
from .serving import LONGEST, decode, largest_batch, requests, weight_bytes
from .timing import product_rate

STEPS = 8
"""Tokens that one timed turn of decoding reads."""


def inference_table(
    *, shape: str, device: str, dtype: str, text: Sequence[int], num_tokens: int, batches: Sequence[int],
    memory: int | None, images: Sequence[int], answer: int, repeats: int, limit: float | None,
    tick: Callable[[str], Any] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark on one model.

    Args:
        text: tokens of the question, a case each; decoding and requests take the first.
        batches: rows that decode together, a case each.
        memory: bytes of the device; each way also decodes at the largest batch that fits.
        images: in a prompt, a case each.
    """
    plain, attached = shapes.pair(shapes.build(shape, device, dtype))
    common: dict[str, Any] = {"num_tokens": num_tokens, "repeats": repeats, "limit": limit}
    vision = int(plain.config.image_seq_length)
    found: dict[str, Any] = {
        "vision_tokens": vision, "product_flops_per_second": product_rate(device, dtype),
        "weight_bytes": weight_bytes(plain), "storage": storage(plain, num_tokens), "first_token": [],
        "decode": [], "paper": PAPER,
    }  # fmt: skip
    for tokens in text:
        tick(f"first token, {tokens} text tokens")
        case = first_token(plain, attached, text=tokens, rows=1, **common)
        rate = found["product_flops_per_second"]
        case["floor_seconds"] = {name: count / rate for name, count in case["flops"].items()}
        found["first_token"].append(case)
    rows = [{"floor": n, "VoCo": n, "full caching": n} for n in batches]
    if memory is not None:
        lengths = {"floor": 0, "VoCo": num_tokens, "full caching": vision}
        slots = {name: shapes.BEFORE + text[0] + more + STEPS for name, more in lengths.items()}
        rows.append({name: largest_batch(plain, memory, count) for name, count in slots.items()})
    for batch in rows:
        tick(f"decoding, batch {batch['VoCo']}")
        found["decode"].append(decode(plain, attached, text=text[0], rows=batch, steps=STEPS, **common))
    tick("requests")
    found["requests"] = requests(
        plain, attached, images=images, text=text[0], answer=answer,
        longest=LONGEST if device == "cpu" else None, **common,
    )  # fmt: skip
    return found


def counted_table(*, shape: str, text: Sequence[int], num_tokens: int, dtype: str) -> dict[str, Any]:
    """Storage and FLOPs of a shape that is not run: counted on one and on two of its layers."""
    text_config = shapes.SHAPES[shape]["text"]
    import torch

    size = torch.finfo(getattr(torch, dtype)).bits // 8
    one = 2 * text_config["num_hidden_layers"] * text_config["hidden_size"] * size
    counts = counted_flops(shape, text=text[0], num_tokens=num_tokens, dtype=dtype)
    return {
        "vision_tokens": shapes.VISION_TOKENS,
        "text_tokens": shapes.BEFORE + text[0],
        "storage": {
            "bytes": {
                "no cache": 0, "full caching": one * shapes.VISION_TOKENS, "VoCo": one * num_tokens,
            },
            "images_in_one_full": shapes.VISION_TOKENS // num_tokens,
        },
        "counted_flops": counts,
        "paper": PAPER,
    }  # fmt: skip
