"""Stage 1 (paper, Sec. 3.3, Fig. 4): ``[vision, VoCo]`` through the backbone; the VoCo tokens' keys and
values stay.

With ``block_context="self"`` every block is a row of its own, whatever prompt it stood in: nothing of the
text is computed, and the LM head never runs. With ``"prefix"`` the stream before a block belongs to what it
computes, so the rows run as they are, up to the last block.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from ..cache_state import CacheState
from ..layout import BlockSpan, SequenceLayout, compact_positions
from .block import VoCoBlock
from .cache import VoCoCache
from .fingerprint import fingerprint

_DROPPED = (
    "labels",
    "use_cache",
    "past_key_values",
    "position_ids",
    "logits_to_keep",
    "return_dict",
    "inputs_embeds",
)


def _per_token(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and tuple(value.shape) == shape


def _pad_id(model: torch.nn.Module, vocab: Any) -> int:
    """An id for padding that no image feature is scattered to."""
    special = vocab.placeholders | vocab.markers
    for token in (getattr(model.config.get_text_config(), "pad_token_id", None), 0, 1, 2):
        if isinstance(token, int) and token >= 0 and token not in special:
            return token
    return vocab.voco_id


def _blocks_as_rows(inputs: dict[str, Any], spans: list[BlockSpan], positions: torch.Tensor, pad: int):
    """Each block's tokens as one right-padded row: inputs, mask ``(b, M)`` and positions ``(…, b, M)``."""
    ids = inputs["input_ids"]
    shape = tuple(ids.shape)
    longest = max(s.stop - s.start for s in spans)
    offsets = torch.arange(longest, device=ids.device)
    starts = torch.tensor([s.start for s in spans], device=ids.device)
    lengths = torch.tensor([s.stop - s.start for s in spans], device=ids.device)
    rows = torch.tensor([s.row for s in spans], device=ids.device)[:, None]
    mask = (offsets < lengths[:, None]).long()
    columns = (starts[:, None] + offsets).clamp_max(shape[1] - 1)

    def take(value: torch.Tensor) -> torch.Tensor:
        return value[..., rows, columns]

    gathered = {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask") or name in _DROPPED or value is None:
            continue
        gathered[name] = take(value) * mask.to(value.dtype) if _per_token(value, shape) else value
    gathered["input_ids"] = torch.where(mask.bool(), take(ids), pad)
    gathered["attention_mask"] = mask
    gathered["position_ids"] = take(positions)
    return gathered


def compress(model: torch.nn.Module, state: Any, inputs: dict[str, Any]) -> VoCoCache:
    """Compress every block of a batch; see :meth:`~voco_plugin.generation.VoCoGenerationMixin.compress`."""
    if not state.config.isolates:
        raise ValueError(
            "rule='causal' lets text read the vision tokens, so there is nothing to compress; use "
            "rule='isolated'."
        )
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError("compress needs input_ids that hold the vision and VoCo tokens.")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    layout = SequenceLayout.from_ids(ids, mask, state.vocab)
    made_by = fingerprint(model, state.config, state.processor, state.vocab.voco_id)
    if state.family.prefix_lm:
        made_by["attention"] = "causal" if inputs.get("token_type_ids") is None else "prefix"
    if not layout.spans:
        return VoCoCache([], [], ids.shape[0], made_by)
    backbone = state.family.backbone(model)
    sequential = state.family.sequential(backbone, ids, mask, inputs).to(ids.device)
    compact = state.config.positions == "compact"
    positions = compact_positions(layout, sequential) if compact else sequential
    first_real = mask.long().argmax(dim=1)  # left padding is no part of the sequence
    cache = DynamicCache()  # a config-built cache would crop windowed layers to their window
    whole = state.config.block_context == "prefix"
    if whole and made_by.get("attention") == "prefix":
        raise ValueError(
            "block_context='prefix' cannot be cached for a backbone that reads its prompt both ways: what a "
            "block sees before it has read the text after it; use block_context='self'."
        )
    if whole:
        stop = max(s.stop for s in layout)
        shape = tuple(ids.shape)
        run = {k: v for k, v in inputs.items() if k not in _DROPPED and v is not None}
        run["attention_mask"] = mask
        run = {k: v[:, :stop] if _per_token(v, shape) else v for k, v in run.items()}
        run["position_ids"] = positions[..., :stop]
    else:
        run = _blocks_as_rows(inputs, layout.spans, positions, _pad_id(model, state.vocab))
        if state.family.chunk_size(model) is not None:  # chunks are cut where the block stands in its prompt
            orders = [s.start - int(first_real[s.row]) for s in layout.spans]
            CacheState.starting_at(torch.tensor(orders, device=ids.device)).put_on(cache)
    run["position_ids"] = state.family.shape_positions(backbone, run["position_ids"])
    with state.positions("trust"):
        backbone(**run, past_key_values=cache, use_cache=True)
    flat = positions if positions.dim() == 2 else positions[0]
    blocks = []
    for number, span in enumerate(layout.spans):
        row = span.row if whole else number
        start, stop = (span.voco, span.stop) if whole else (span.num_vision, span.stop - span.start)
        first = int(flat[span.row, span.voco])
        extent = first - int(positions[..., span.row, span.start].amax())
        blocks.append(
            VoCoBlock(
                keys=tuple(layer.keys[row, :, start:stop].clone() for layer in cache.layers),
                values=tuple(layer.values[row, :, start:stop].clone() for layer in cache.layers),
                position=first,
                extent=extent,
                num_vision=span.num_vision,
                relocatable=not whole,
                order=span.voco - int(first_real[span.row]),
            )
        )
    return VoCoCache(blocks, [s.row for s in layout.spans], ids.shape[0], made_by)
