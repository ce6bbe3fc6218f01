"""Whether two ways of computing the same answers agree: the single masked pass and stage 2 from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Agreement:
    """How two ways of computing the same answers compare: single pass against stage 2 from a cache.

    Attributes:
        equal: answers that are the same, token by token.
        total: answers compared.
        max_logit_difference: the largest absolute difference over every answer position and the vocabulary.
    """

    equal: int
    total: int
    max_logit_difference: float


def agreement(
    model: Any, processor: Any, questions: Sequence[str], images: Any, caches: Any, max_new_tokens: int
) -> Agreement:
    """Greedy answers from ``caches`` against the single masked pass over the images (contract 1 of the
    architecture).

    The single pass is one forward over prompt and answer, from which the greedy choice at every position is
    read; it shares nothing with the cached path but the weights.
    """
    import torch

    from ..inference.answering import prompt

    equal, worst = 0, 0.0
    with torch.no_grad():
        for question, row, cache in zip(questions, images, caches, strict=True):
            stream = prompt(model, processor, [question], caches=[cache])
            ids = model.generate(**stream, max_new_tokens=max_new_tokens, do_sample=False)
            fresh = ids[:, stream["input_ids"].shape[1] :]
            single = prompt(model, processor, [question], images=[row])
            full = model(**_extended(single, fresh)).logits[0, -fresh.shape[1] - 1 : -1].float()
            cached = model(**_extended(stream, fresh)).logits[0, -fresh.shape[1] - 1 : -1].float()
            worst = max(worst, (full - cached).abs().max().item())
            equal += bool((full.argmax(-1) == fresh[0]).all())
    return Agreement(equal, len(questions), worst)


def _extended(inputs: dict[str, Any], fresh: Any) -> dict[str, Any]:
    """``inputs`` with the answer's ids ``(1, A)`` appended to every per-token tensor."""
    import torch

    length = inputs["input_ids"].shape[1]
    out = dict(inputs)
    out["input_ids"] = torch.cat([inputs["input_ids"], fresh], dim=1)
    for key, value in inputs.items():
        if key != "input_ids" and torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == length:
            filler = torch.ones_like(fresh) if key == "attention_mask" else torch.zeros_like(fresh)
            out[key] = torch.cat([value, filler.to(value.dtype)], dim=1)
    return out
