"""The flex backend: FlexAttention with a block mask of the same predicate, built once a forward.

A block mask says of each tile of 128 × 128 pairs whether it is hidden, whole or mixed: hidden tiles are not
computed, and the mask grows with the number of tiles that are seen. Masks of a plain causal backbone are kept
for the next forward of the same layout (frames of one size come again and again).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import causal_mask_function, flex_attention_mask

from ..forward import active_rule
from ..masks import ActiveRule
from .interface import with_rule

_KEPT = 16
_masks: OrderedDict[tuple, Any] = OrderedDict()
_with_rule = with_rule(flex_attention_mask)


def flex_mask(*, mask_function: Callable = causal_mask_function, attention_mask: Any = None, **kwargs: Any):
    """As transformers' mask functions: the ``BlockMask`` of a forward."""
    active = active_rule()
    if active is None:
        return flex_attention_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    key = None
    if mask_function is causal_mask_function and active.prefix is None:
        key = (
            _layout_key(active, attention_mask),
            *(kwargs.get(n) for n in _SHAPE),
            str(kwargs.get("device")),
        )
        if key in _masks:
            active.masks_built += 1
            _masks.move_to_end(key)
            return _masks[key]
    with _fixed_shapes(torch.device(kwargs.get("device", "cpu"))):
        made = _with_rule(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    if key is not None:
        _masks[key] = made
        while len(_masks) > _KEPT:
            _masks.popitem(last=False)
    return made


_SHAPE = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset")


def _layout_key(active: ActiveRule, attention_mask: torch.Tensor | None) -> tuple:
    config, table = active.config, active.table
    tensors = [table.kind, table.block, table.order]
    if table.document is not None:
        tensors.append(table.document)
    if attention_mask is not None:
        tensors.append(attention_mask.to(torch.int64))
    facts = tuple(t.cpu().contiguous().numpy().tobytes() for t in tensors)
    packed = table.document is not None
    rule = (config.rule, config.block_context, config.hide_prefix, config.reads_vision)
    return (*rule, packed, facts)


def flex_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """transformers' FlexAttention.

    Raises:
        ValueError: training on a CPU, for which torch has no backward kernel.
    """
    _refuse_training_on_cpu(query)
    with _fixed_shapes(query.device):
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _refuse_training_on_cpu(query: torch.Tensor) -> None:
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        raise ValueError(
            "attention='flex' has no backward on a CPU; use 'segmented', or run under torch.no_grad()."
        )


def _fixed_shapes(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU, compile for each shape anew: the C++ that torch 2.15 writes for changing ones does not
    compile.
    """
    if device.type != "cpu":
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)
