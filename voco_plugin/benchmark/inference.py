"""Table 7 of the paper: what it takes to answer a prompt with an image in it, four ways on the same weights.

    floor         plain prefill of a text as long as stage 2's stream: no image at all
    VoCo          stage 2: cached blocks are placed (moved to where the prompt wants them), the text is read
    full caching  the keys and values of all vision tokens are there, all of the text is read behind them
    no cache      vision tower, vision tokens and text

All give the logits of the last token. ``B`` rows, one image each unless said otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..core.forward import as_cache, cache_of
from . import shapes
from .timing import Way, compare, flops, interleaved_times, synchronised

PAPER = {
    "no cache": {"flops": 9.6e12, "ms": 440.5},
    "full caching": {"bytes": 302.4e6, "flops": 1.2e12, "ms": 154.9},
    "VoCo": {"bytes": 0.525e6, "flops": 0.5e12, "ms": 134.0},
}
"""The paper's Table 7: LLaVA-1.5-7B on an A100; its prompt's length is not given."""


def first_token_ways(
    plain: Any, attached: Any, *, text: int, num_tokens: int, rows: int
) -> tuple[dict[str, Way], int]:
    """The four ways to the first token of ``rows`` prompts, and the tokens of a row's stream."""
    inputs = shapes.prompt(plain, text, num_tokens, rows)
    whole = shapes.without_voco(plain, inputs)
    ids = whole["input_ids"]
    end = shapes.BEFORE + int(plain.config.image_seq_length)
    image = ids[:, shapes.BEFORE : end]  # alone: every way reads all of the text
    past = cache_of(plain(
        input_ids=image, attention_mask=torch.ones_like(image), pixel_values=whole["pixel_values"],
        use_cache=True, logits_to_keep=1,
    ))  # fmt: skip
    words_of = torch.cat([ids[:, : shapes.BEFORE], ids[:, end:]], dim=1)
    # compressed alone, so that every block has to move
    alone = {"input_ids": inputs["input_ids"][:, shapes.BEFORE : end + num_tokens]}
    cache = attached.compress(**alone, pixel_values=inputs["pixel_values"])
    stream = attached.stream_inputs(inputs)
    words = text_ids(plain, stream["input_ids"].shape)
    asked = {"input_ids": words_of, "attention_mask": whole["attention_mask"]}
    floor = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    last = {"use_cache": True, "logits_to_keep": 1}

    def full() -> Callable[[], Any]:
        own = copy.deepcopy(past)  # a forward appends to it
        return lambda: plain(**asked, **as_cache(own), **last)

    ways: dict[str, Way] = {
        "floor": lambda: lambda: plain(**floor, **last),
        "VoCo": lambda: lambda: attached(**stream, voco_cache=cache, logits_to_keep=1),
        "full caching": full,
        "no cache": lambda: lambda: plain(**whole, **last),
    }
    ways["VoCo"]()()  # the first time a model moves a block it looks at how its layers rotate
    return ways, words.shape[1]


def text_ids(model: Any, shape: Any) -> torch.Tensor:
    """Random text ids of that shape, on the model's device."""
    draw = torch.Generator().manual_seed(2)
    high = int(model.config.image_token_id) - 1
    return torch.randint(5, high, tuple(shape), generator=draw).to(model.device)


@torch.no_grad()
def first_token(
    plain: Any, attached: Any, *, text: int, num_tokens: int, rows: int, repeats: int,
    limit: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Median seconds to the first token of each way, its ratio to the floor, and its FLOPs."""
    ways, stream = first_token_ways(plain, attached, text=text, num_tokens=num_tokens, rows=rows)
    counted = {name: flops(way()) for name, way in ways.items()}
    timed = {name: synchronised(way, plain.device) for name, way in ways.items()}
    found = compare(interleaved_times(timed, repeats, limit=limit), "floor")
    return {
        "rows": rows, "text_tokens": text, "stream_tokens": stream, "num_tokens": num_tokens,
        "seconds": found["seconds"], "flops": counted, "ratio_to_floor": found["ratio"],
    }  # fmt: skip


@torch.no_grad()
def images_in_a_prompt(
    plain: Any, attached: Any, *, images: int, text: int, num_tokens: int, repeats: int
) -> dict[str, Any]:
    """Stage 2 with many cached images in one prompt, against plain prefill of a text of that length."""
    stream, cache = many_images(plain, attached, images=images, text=text, num_tokens=num_tokens)
    words = text_ids(plain, stream.shape)
    ways: dict[str, Way] = {
        "floor": lambda: lambda: plain(
            input_ids=words, attention_mask=torch.ones_like(words), use_cache=True, logits_to_keep=1
        ),
        "VoCo": lambda: lambda: attached(input_ids=stream, voco_cache=cache, logits_to_keep=1),
    }  # fmt: skip
    timed = {name: synchronised(way, plain.device) for name, way in ways.items()}
    found = compare(interleaved_times(timed, repeats), "floor")
    return {
        "images": images, "stream_tokens": stream.shape[1], "seconds": found["seconds"],
        "ratio_to_floor": found["ratio"]["VoCo"],
    }  # fmt: skip


def many_images(
    plain: Any, attached: Any, *, images: int, text: int, num_tokens: int
) -> tuple[torch.Tensor, Any]:
    """The stream ``(1, 8 + images · K + text)`` of a prompt with many images, and their blocks: one image
    compressed once, named as often as asked.
    """
    from ..cache import VoCoCache

    one = shapes.prompt(plain, text, num_tokens, rows=1)
    ids = one["input_ids"][0]
    end = shapes.BEFORE + int(plain.config.image_seq_length) + num_tokens
    alone = attached.compress(input_ids=ids[None, shapes.BEFORE : end], pixel_values=one["pixel_values"])
    cache = VoCoCache.cat([alone] * images)
    voco = torch.full((num_tokens * images,), shapes.voco_id(plain), device=ids.device)
    return torch.cat([ids[: shapes.BEFORE], voco, ids[end:]])[None], cache


@torch.no_grad()
def counted_flops(shape: str, *, text: int, num_tokens: int, dtype: str = "bfloat16") -> dict[str, int]:
    """FLOPs to the first token, by way, of a shape too deep to run here.

    Models of one and of two layers of full width are counted; a layer's FLOPs do not depend on the others,
    so the rest is arithmetic: ``f(L) = f(1) + (L - 1) · (f(2) - f(1))``.
    """
    layers = int(shapes.SHAPES[shape]["text"]["num_hidden_layers"])
    counts = []
    for depth in (1, 2):
        plain, attached = shapes.pair(shapes.build(shape, "cpu", dtype, layers=depth, random=False))
        ways, _ = first_token_ways(plain, attached, text=text, num_tokens=num_tokens, rows=1)
        counts.append({name: flops(way()) for name, way in ways.items()})
        del plain, attached, ways
    one, two = counts
    return {name: one[name] + (layers - 1) * (two[name] - one[name]) for name in one}


def storage(model: Any, num_tokens: int) -> dict[str, Any]:
    """Bytes that one image keeps, by way, and how many cached images fit where one full-KV image is kept."""
    one, tokens = shapes.token_bytes(model), int(model.config.image_seq_length)
    return {
        "bytes": {"no cache": 0, "full caching": one * tokens, "VoCo": one * num_tokens},
        "images_in_one_full": tokens // num_tokens,
    }
