"""A batch with another number of VoCo tokens after each image (elastic K, paper, Table 4).

Shapes: ``R`` rows, ``N`` tokens a row before, ``M`` after.
"""

from __future__ import annotations

from typing import Any

import torch

from ...core.layout import SequenceLayout, is_per_token


def recut(inputs: dict[str, Any], layout: SequenceLayout, num_tokens: int, pad_id: int) -> dict[str, Any]:
    """``inputs`` with ``num_tokens`` VoCo tokens in every block, where ``layout`` has any number.

    A token that is new gets, in every per-token tensor, what the block's first VoCo token has there.

    Raises:
        ValueError: ``num_tokens`` is not an integer of at least 1.
    """
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens!r} must be an integer of at least 1.")
    if all(span.num_voco == num_tokens for span in layout):
        return inputs
    ids = inputs["input_ids"]
    shape = (ids.shape[0], ids.shape[1])
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    plans = []
    for row in range(shape[0]):
        plan: list[int] = []
        done = 0
        for span in layout.row_spans(row):
            kept = range(span.voco, min(span.stop, span.voco + num_tokens))
            plan += [*range(done, span.voco), *kept, *[span.voco] * (num_tokens - len(kept))]
            done = span.stop
        plan += range(done, shape[1])
        real = mask[row].tolist()
        plans.append([column for column in plan if real[column]])
    left = bool((mask[:, 0] == 0).any())
    length = max(map(len, plans))
    source = torch.full((shape[0], length), -1)
    for row, plan in enumerate(plans):
        where = slice(length - len(plan), length) if left else slice(0, len(plan))
        source[row, where] = torch.tensor(plan, dtype=torch.long)
    source = source.to(ids.device)
    there, columns = source >= 0, source.clamp_min(0)
    out = dict(inputs)
    for name, value in inputs.items():
        if is_per_token(name, value, shape):
            fill = pad_id if name == "input_ids" else 0
            out[name] = torch.where(there, value.gather(1, columns), fill)
    out["attention_mask"] = there.to(mask.dtype)
    return out
