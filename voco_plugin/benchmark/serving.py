"""Decoding and whole requests from cached images: time a token, the largest batch, requests a second.

Decoding is timed as the model's own forward on one new token of each row behind a KV cache of the length that
each way leaves behind: keys and values are random where a way would only have copied them. transformers'
``DynamicCache`` writes its whole KV anew at each step; that is part of what every way pays for its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ..cache import VoCoCache
from ..core.forward import as_cache, cache_of
from . import shapes
from .inference import many_images, text_ids
from .timing import Way, compare, interleaved_times, synchronised

LONGEST = 8192
"""Tokens of a prompt above which ``no cache`` is not run on a CPU."""


def random_past(model: Any, rows: int, tokens: int) -> DynamicCache:
    """A KV cache of ``rows`` rows and ``tokens`` slots with random keys and values."""
    text = model.config.text_config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    past = DynamicCache()
    for layer in range(text.num_hidden_layers):
        shape = (rows, text.num_key_value_heads, tokens, dim)
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        past.update(keys, values, layer)
    return past


def _cut(past: Any, length: int) -> None:
    """Take off what a turn before appended."""
    more = past.get_seq_length() - length
    if more > 0:
        past.crop(-more)


def _steps(model: Any, past: Any, steps: int) -> Way:
    """A way that reads ``steps`` tokens behind ``past``, which is cut back before the next turn."""
    length = past.get_seq_length()
    rows = past.layers[0].keys.shape[0]
    token = text_ids(model, (rows, 1))
    masks = [torch.ones(rows, length + n, dtype=torch.long, device=model.device) for n in range(1, steps + 1)]

    def made() -> Callable[[], Any]:
        _cut(past, length)

        def run() -> None:
            for mask in masks:
                model(input_ids=token, attention_mask=mask, use_cache=True, **as_cache(past))

        return run

    return made


@torch.no_grad()
def decode(
    plain: Any, attached: Any, *, text: int, num_tokens: int, rows: dict[str, int], steps: int, repeats: int,
    limit: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds a decoded token of each way behind a prompt of one image.

    Args:
        rows: of each way: ``floor`` (no image), ``VoCo``, ``full caching`` (no cache leaves the same KV).

    Returns:
        ``seconds`` a step, its ``ratio`` to the floor's, ``tokens_per_second`` over all rows, and the slots
        and bytes of a row's KV.
    """
    vision = int(plain.config.image_seq_length)
    stream, cache = many_images(plain, attached, images=1, text=text, num_tokens=num_tokens)
    ways, slots = {}, {}
    for name, count in rows.items():
        if name == "VoCo":
            batch = stream.expand(count, -1)
            output = attached(
                input_ids=batch, attention_mask=torch.ones_like(batch),
                voco_cache=VoCoCache.stack([cache] * count), logits_to_keep=1,
            )  # fmt: skip
            slots[name] = stream.shape[1]
            ways[name] = _steps(attached, cache_of(output), steps)
        else:
            slots[name] = shapes.BEFORE + text + (vision if name == "full caching" else 0)
            ways[name] = _steps(plain, random_past(plain, count, slots[name]), steps)
    timed = {name: synchronised(way, plain.device) for name, way in ways.items()}
    times = interleaved_times(timed, repeats, warm_up=1, limit=limit)
    found = compare({name: [t / steps for t in values] for name, values in times.items()}, "floor")
    return {
        "rows": rows, "slots": slots, "steps": steps, "seconds": found["seconds"],
        "ratio_to_floor": found["ratio"],
        "kv_bytes": {name: shapes.token_bytes(plain) * count * rows[name] for name, count in slots.items()},
        "tokens_per_second": {name: rows[name] / s for name, s in found["seconds"].items()},
    }  # fmt: skip


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def largest_batch(model: Any, memory: int, slots: int) -> int:
    """Rows whose KV caches of ``slots`` slots fit ``memory`` bytes next to the weights, a tenth kept free.

    A row takes its KV, one layer of it twice (a ``DynamicCache`` writes it anew), and its logits in the
    model's dtype and in fp32.

    Raises:
        ValueError: not even one row fits.
    """
    text = model.config.text_config
    size = torch.finfo(model.dtype).bits // 8
    row = shapes.token_bytes(model) * slots * (1 + 1 / text.num_hidden_layers) + text.vocab_size * (size + 4)
    rows = int((0.9 * memory - weight_bytes(model)) // row)
    if rows < 1:
        need = (weight_bytes(model) + row) / 0.9
        raise ValueError(
            f"--memory {memory} bytes does not hold the weights and one row of {slots} tokens; give at "
            f"least {int(need) + 1}, or a smaller --shape."
        )
    return rows


@torch.no_grad()
def requests(
    plain: Any, attached: Any, *, images: Sequence[int], text: int, num_tokens: int, answer: int,
    repeats: int, limit: float | None = None, longest: int | None = LONGEST,
) -> list[dict[str, Any]]:  # fmt: skip
    """Requests a second, one after the other, as the images in a prompt grow: the prompt is read and
    ``answer`` tokens are decoded.

    Args:
        longest: tokens of a prompt above which ``no cache`` is left out (``None`` in the result).
    """
    found = []
    for count in images:
        stream, cache = many_images(plain, attached, images=count, text=text, num_tokens=num_tokens)
        vision = count * int(plain.config.image_seq_length)
        ways = {
            "VoCo": _request(attached, {"input_ids": stream, "voco_cache": cache}, answer),
            "full caching": _behind(plain, random_past(plain, 1, vision), shapes.BEFORE + text, answer),
        }
        left_out = longest is not None and shapes.BEFORE + vision + text > longest
        if not left_out:
            inputs = shapes.without_voco(plain, shapes.prompt(plain, text, num_tokens, 1, images=count))
            ways["no cache"] = _request(plain, {**inputs, "use_cache": True}, answer)
        timed = {name: synchronised(way, plain.device) for name, way in ways.items()}
        some = compare(interleaved_times(timed, repeats, warm_up=1, limit=limit, least=2), "full caching")
        entry = {
            "images": count, "prompt_tokens": shapes.BEFORE + vision + text, "answer_tokens": answer,
            "stream_tokens": stream.shape[1], "seconds": some["seconds"],
            "requests_per_second": {name: 1 / s for name, s in some["seconds"].items()},
            "ratio_to_full_caching": some["ratio"],
        }  # fmt: skip
        if left_out:
            entry["left_out"] = f"no cache: {entry['prompt_tokens']} tokens are more than {longest}"
        found.append(entry)
        del ways, timed
    return found


def _decoded(model: Any, output: Any, answer: int) -> None:
    """The tokens after the first, greedily; the prompt's length is its KV cache's."""
    for _ in range(answer - 1):
        past = cache_of(output)
        token = output.logits[:, -1:].argmax(dim=-1)
        mask = torch.ones(1, past.get_seq_length() + 1, dtype=torch.long, device=token.device)
        output = model(input_ids=token, attention_mask=mask, use_cache=True, **as_cache(past))


def _request(model: Any, inputs: dict[str, Any], answer: int) -> Way:
    return lambda: lambda: _decoded(model, model(**inputs, logits_to_keep=1), answer)


def _behind(model: Any, past: Any, text: int, answer: int) -> Way:
    """A text read behind ``past``, which is cut back before the next turn."""
    length = past.get_seq_length()
    words = text_ids(model, (1, text))
    mask = torch.ones(1, length + text, dtype=torch.long, device=model.device)

    def made() -> Callable[[], Any]:
        _cut(past, length)
        given = {"input_ids": words, "attention_mask": mask, "use_cache": True, **as_cache(past)}
        return lambda: _decoded(model, model(**given, logits_to_keep=1), answer)

    return made
