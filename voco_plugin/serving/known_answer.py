"""A question with an image whose answer stage 2 has given, for an engine in another process: does it serve
this model, and reach this store?
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ..core.attachment import input_device, unwrap
from ..inference.answering import compress_images
from ..inference.prompts import ask, stream_of
from .engines.request import EngineRequest, Sampling, Step

_NEW = 3
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-3}
_ROUNDED = 0.25


@torch.no_grad()
def known_answer(model: Any, processor: Any, store: Any) -> tuple[EngineRequest, list[Step], float]:
    """A request, its greedy answer, and how far off its log-probabilities may be.

    The block of a grey image is put into ``store``.
    """
    image = Image.new("RGB", (64, 64), (90, 120, 60))
    key = store.key_of(image)
    (cache,) = compress_images(model, processor, [image])
    store.put(key, cache.to("cpu"))
    cache = store.get(key)
    stream = stream_of(model, processor, [ask("What is this?")], cache)
    ids = stream["input_ids"].to(input_device(unwrap(model)))
    prompt = tuple(ids[0].tolist())
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), voco_cache=cache.to(ids.device),
        max_new_tokens=_NEW, do_sample=False, eos_token_id=-1, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    tokens = found.sequences[0, len(prompt) :].tolist()
    steps = [
        Step(token, float(logits[0].float().log_softmax(-1)[token]))
        for logits, token in zip(found.logits, tokens, strict=True)
    ]
    request = EngineRequest(prompt, cache, (key,), Sampling(_NEW, logprobs=0, ignore_eos=True))
    dtype: Any = unwrap(model).dtype
    return request, steps, _TOLERANCE.get(dtype, _ROUNDED)


__all__ = ["known_answer"]
