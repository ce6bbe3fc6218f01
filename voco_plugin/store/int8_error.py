"""What 8 bits cost: logits and greedy tokens of stage 2 from quantised blocks, against the exact ones.

Shapes: ``B`` prompts, ``N`` tokens of the compressed stream, ``W`` words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..cache.cache import VoCoCache, cache_from_buffer, cache_to_bytes
from ..core.attachment import attachment


@torch.no_grad()
def quantization_error(
    model: Any, inputs: Mapping[str, Any], caches: VoCoCache | Sequence[VoCoCache]
) -> dict[str, Any]:
    """How stage 2 from ``caches`` in 8 bits differs from stage 2 from them as they are.

    Args:
        model: attached.
        inputs: the compressed stream: ``input_ids`` and ``attention_mask`` ``(B, N)``, and whatever else the
            model takes; :func:`voco_plugin.inference.answering.prompt` makes it.
        caches: the blocks of the ``B`` rows: a batch, or one cache per row.

    Returns:
        over the text tokens that stand after a block: ``max_abs_logit`` and ``mean_abs_logit`` (differences
        of logits), ``logit_std`` (of the exact ones, to compare them with), ``greedy_agreement`` (share of
        tokens whose most likely next token is the same), ``tokens``, ``prompts``; and ``bytes_exact``,
        ``bytes_int8`` of the saved caches.

    Raises:
        ValueError: no text token stands after a block.
    """
    exact = caches if isinstance(caches, VoCoCache) else VoCoCache.stack(caches)
    saved = cache_to_bytes(exact, "int8")
    quantized = cache_from_buffer(saved)
    stream = {name: value for name, value in inputs.items() if name != "voco_cache"}
    voco = attachment(model).vocab.voco_id
    is_voco = stream["input_ids"] == voco
    chosen = stream["attention_mask"].bool() & ~is_voco & (is_voco.cumsum(dim=1) > 0)
    if not bool(chosen.any()):
        raise ValueError("no text token stands after a block, so there is no logit to compare.")
    device = stream["input_ids"].device
    a = model(**stream, voco_cache=exact.to(device)).logits[chosen].float()
    b = model(**stream, voco_cache=quantized.to(device)).logits[chosen].float()
    difference = (a - b).abs()
    return {
        "max_abs_logit": float(difference.max()),
        "mean_abs_logit": float(difference.mean()),
        "logit_std": float(a.std()),
        "greedy_agreement": float((a.argmax(dim=-1) == b.argmax(dim=-1)).float().mean()),
        "tokens": int(chosen.sum()),
        "prompts": int(chosen.any(dim=1).sum()),
        "bytes_exact": len(cache_to_bytes(exact)),
        "bytes_int8": len(saved),
    }
