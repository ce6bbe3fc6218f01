"""A long video: frames compressed as they come, then one question over all of them."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..cache import VoCoCache
from . import shapes
from .inference import text_ids
from .peak_memory import peak, reset_peak
from .timing import Way, compare, interleaved_times, synchronised

FRAME_SIZE = 224
"""Pixels of a frame: 16 x 16 = 256 vision tokens."""


@torch.no_grad()
def long_video(
    *, frames: int, shape: str, device: str, dtype: str, num_tokens: int, batch: int, text: int, repeats: int,
    max_memory: int | None = None, image_size: int = FRAME_SIZE,
) -> dict[str, Any]:  # fmt: skip
    """Stage 1 over all frames and stage 2 over what they left behind.

    Args:
        batch: frames given to ``model.compress`` at a time.
        max_memory: as ``model.compress`` takes it.

    Returns:
        ``compress``: seconds, frames a second and peak bytes on top of the weights, decoding and
        preprocessing of frames left out; ``stage_two``: seconds to the first token beside the floor (plain
        prefill of a text of that length); ``cache_bytes`` and what all vision tokens' KV would take.
    """
    model = shapes.build(shape, device, dtype, image_size=image_size)
    plain, attached = shapes.pair(model)
    vision = int(model.config.image_seq_length)
    attached.compress(**shapes.batch_of(model, min(batch, frames), num_tokens))  # warm up
    before = reset_peak(device)
    caches, done, seconds = [], 0, 0.0
    while done < frames:
        count = min(batch, frames - done)
        inputs = shapes.batch_of(model, count, num_tokens)
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        caches.append(attached.compress(**inputs, max_memory=max_memory))
        if device != "cpu":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        done += count
    used = peak(device) - before
    cache = VoCoCache([block for one in caches for block in one.blocks], fingerprint=caches[0].fingerprint)
    words = text_ids(model, (1, text))
    voco = torch.full((1, frames * num_tokens), shapes.voco_id(model), device=words.device)
    stream = torch.cat([voco, words], dim=1)
    floor = text_ids(model, stream.shape)
    ways: dict[str, Way] = {
        "floor": lambda: lambda: plain(
            input_ids=floor, attention_mask=torch.ones_like(floor), use_cache=True, logits_to_keep=1
        ),
        "VoCo": lambda: lambda: attached(input_ids=stream, voco_cache=cache, logits_to_keep=1),
    }  # fmt: skip
    timed = {name: synchronised(way, device) for name, way in ways.items()}
    found = compare(interleaved_times(timed, repeats, warm_up=1), "floor")
    return {
        "frames": frames, "vision_tokens": vision, "num_tokens": num_tokens, "batch": batch,
        "max_memory": max_memory,
        "compress": {"seconds": seconds, "frames_per_second": frames / seconds, "peak_bytes": used},
        "stage_two": {"stream_tokens": stream.shape[1], **found},
        "cache_bytes": cache.nbytes,
        "all_vision_tokens_bytes": shapes.token_bytes(model) * vision * frames,
    }  # fmt: skip
