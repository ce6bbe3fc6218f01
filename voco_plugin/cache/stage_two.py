"""Stage 2 (paper, Sec. 3.3, Fig. 4): the blocks' keys and values as a KV prefix, the text after them.

Per row the KV cache holds ``[padding, C of every block, text …]``: the blocks come first whatever their place
in the stream. Where each stands in the sequence is kept beside the cache, so that a text token sees only
blocks before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ..cache_state import CacheState
from ..layout import TokenKind
from ..masks import TokenTable
from .block import VoCoBlock
from .cache import VoCoCache
from .fingerprint import differences, fingerprint
from .relocation import relocator_for


@dataclass
class Placed:
    """What stage 2 runs on. ``B`` rows, ``S`` stream tokens, ``T`` text tokens (left-padded), ``P`` cached
    slots.

    Attributes:
        input_ids: ``(B, T)``, the stream without its VoCo tokens.
        attention_mask: ``(B, P + T)``.
        position_ids: ``(B, T)``.
        past_key_values: the placed blocks.
        columns: ``(B, T)``, the stream column of each text token; -1 for padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    past_key_values: DynamicCache
    columns: torch.Tensor


def _check(model, state, cache: VoCoCache) -> None:
    if not state.config.isolates:
        raise ValueError(
            "rule='causal' has no cached inference: text reads the vision tokens; use rule='isolated'."
        )
    if not len(cache):
        return
    if not cache.fingerprint:
        raise ValueError(
            "this cache has no fingerprint, so it cannot be told which model made it; make it with "
            "model.compress, or give VoCoCache(…, fingerprint=…) the fingerprint of the cache it came from."
        )
    mine = fingerprint(model, state.config, state.processor, state.vocab.voco_id)
    if state.family.prefix_lm and "attention" in cache.fingerprint:
        mine["attention"] = cache.fingerprint["attention"]  # told by the inputs of stage 1, not by the model
    wrong = differences(mine, cache.fingerprint)
    if wrong:
        raise ValueError(
            f"this cache was not made by this model under this rule: {'; '.join(wrong)}; compress the images "
            "again."
        )


def _rows_of_blocks(cache: VoCoCache, rows: int) -> list[list[VoCoBlock]]:
    if cache.num_rows == rows:
        return [[b for b, r in zip(cache.blocks, cache.rows, strict=True) if r == row] for row in range(rows)]
    if cache.num_rows == 1:
        return [list(cache.blocks)] * rows  # one set of images, many prompts
    raise ValueError(
        f"the cache holds {cache.num_rows} rows and input_ids {rows}; give one row of blocks per prompt."
    )


def _walk(row: int, kinds: list[int], blocks: list[VoCoBlock], compact: bool) -> tuple[list, list]:
    """Positions and sequence indices of one row: text ``[(column, position, order)]``, blocks ``[(position,
    order)]``.
    """
    text, placed = [], []
    position = order = column = 0
    while column < len(kinds):
        kind = kinds[column]
        if kind == TokenKind.TEXT:
            text.append((column, position, order))
            position, order, column = position + 1, order + 1, column + 1
        elif kind == TokenKind.VOCO:
            if len(placed) == len(blocks):
                raise ValueError(
                    f"sample {row}, position {column}: a VoCo token with no block for it; the cache holds "
                    f"{len(blocks)} block(s) for this row."
                )
            block = blocks[len(placed)]
            length = 0
            while length < block.num_tokens and column < len(kinds) and kinds[column] == TokenKind.VOCO:
                length, column = length + 1, column + 1
            if length < block.num_tokens:
                raise ValueError(
                    f"sample {row}, position {column - length}: {length} VoCo token(s) for block "
                    f"{len(placed)}, which holds {block.num_tokens}; use {block.num_tokens} in the prompt, "
                    f"or cache.first({length})."
                )
            position += 0 if compact else block.extent
            order += block.num_vision
            placed.append((position, order))
            position, order = position + length, order + length
        else:
            column += 1
    if len(placed) < len(blocks):
        raise ValueError(
            f"sample {row}: the cache holds {len(blocks)} block(s) and the prompt VoCo tokens for "
            f"{len(placed)}; put each block's VoCo tokens into the prompt, or take a part of the cache "
            "(cache[:n])."
        )
    return text, placed


def place(
    model,
    state,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: VoCoCache,
    token_types: torch.Tensor | None = None,
) -> Placed:
    """Put ``cache`` under the stream ``input_ids`` ``(B, S)``.

    Args:
        token_types: ``(B, S)``, a prefix-LM's ``token_type_ids`` of the stream; ``None`` takes all of it for
            the prefix where stage 1 was given token types, as the processor does for a prompt.

    Raises:
        ValueError: another model's cache, another K, blocks and VoCo tokens that do not match, vision tokens
            in the stream, a row without text, or a block that cannot be moved to where the prompt puts it.
    """
    _check(model, state, cache)
    rows, columns = input_ids.shape
    device = input_ids.device
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if tuple(mask.shape) != (rows, columns):
        raise ValueError(f"attention_mask must be 2-D of shape {(rows, columns)}, not {tuple(mask.shape)}.")
    kinds = torch.where(mask.bool(), TokenKind.TEXT, TokenKind.PAD)
    kinds = torch.where((input_ids == state.vocab.voco_id) & mask.bool(), TokenKind.VOCO, kinds)
    vision = (
        torch.isin(input_ids, torch.tensor(sorted(state.vocab.placeholders), device=device)) & mask.bool()
    )
    if bool(vision.any()):
        row, column = (int(v) for v in vision.nonzero()[0])
        raise ValueError(
            f"sample {row}, position {column}: the stream holds an image token; with voco_cache the prompt "
            "holds only text and VoCo tokens (model.stream_inputs drops the vision tokens)."
        )
    per_row = _rows_of_blocks(cache, rows)
    compact = state.config.positions == "compact"
    walked = [_walk(r, kinds[r].tolist(), per_row[r], compact) for r in range(rows)]
    empty = next((r for r, (text, _) in enumerate(walked) if not text), None)
    if empty is not None:
        raise ValueError(
            f"sample {empty}: the prompt holds no text token to answer from; add one after the images."
        )

    text_length = max(len(text) for text, _ in walked)
    slots = max((sum(b.num_tokens for b in blocks) for blocks in per_row), default=0)
    ids = input_ids.new_full((rows, text_length), int(_any_text_id(input_ids, kinds)))
    full_mask = torch.zeros(rows, slots + text_length, dtype=torch.long, device=device)
    position_ids = torch.zeros(rows, text_length, dtype=torch.long, device=device)
    source = torch.full((rows, text_length), -1, dtype=torch.long, device=device)
    kind = torch.full((rows, slots), TokenKind.PAD, dtype=torch.long)
    block_of = torch.full((rows, slots), -1, dtype=torch.long)
    order_of = torch.zeros(rows, slots, dtype=torch.long)
    starts = torch.zeros(rows, dtype=torch.long)
    orders = torch.zeros(rows, text_length, dtype=torch.long)
    for row, (text, placed) in enumerate(walked):
        pad = text_length - len(text)
        at = torch.tensor(text, device=device)
        source[row, pad:], position_ids[row, pad:] = at[:, 0], at[:, 1]
        ids[row, pad:] = input_ids[row, at[:, 0]]
        orders[row, pad:] = at[:, 2].cpu()
        full_mask[row, slots + pad :] = 1
        slot = slots - sum(b.num_tokens for b in per_row[row])
        full_mask[row, slot:slots] = 1
        for number, (block, (_, order)) in enumerate(zip(per_row[row], placed, strict=True)):
            end = slot + block.num_tokens
            kind[row, slot:end], block_of[row, slot:end] = TokenKind.VOCO, number
            order_of[row, slot:end] = torch.arange(order, order + block.num_tokens)
            slot = end
        starts[row] = text[-1][1] + 1
    # a chunked backbone counts its chunks from the mask's first real slot, and the slots before it as order
    leading = (full_mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True).cpu()
    orders, order_of = orders + leading, order_of + leading
    past = _key_values(
        model,
        state,
        per_row,
        [placed for _, placed in walked],
        slots,
        int(position_ids.max()),
        int(orders.max()) + 1,
    )
    table = TokenTable(kind, block_of, order_of).to(device)
    text_kind = torch.where(source >= 0, TokenKind.TEXT, TokenKind.PAD)
    planned = TokenTable(text_kind, torch.full_like(text_kind, -1), orders.to(device))
    CacheState(
        table=table,
        next_position=starts.to(device),
        next_order=planned.order[:, -1] + 1,
        num_blocks=torch.tensor([len(b) for b in per_row], device=device),
        planned=planned,
        planned_positions=position_ids,
        planned_prefix=_prefix(state, cache, table, source, token_types),
    ).put_on(past)
    return Placed(ids, full_mask, position_ids, past, source)


def _prefix(state, cache: VoCoCache, table: TokenTable, source: torch.Tensor, token_types) -> Any:
    """``(B, P + T)`` bool, what sees each other both ways; ``None`` outside a prefix-LM's bidirectional
    prompt.
    """
    if cache.fingerprint.get("attention") != "prefix" or not table.length:
        return None
    text = source >= 0
    if token_types is not None:
        text = text & state.family.prefix(token_types.to(source.device).gather(1, source.clamp_min(0)))
    return torch.cat([table.kind == TokenKind.VOCO, text], dim=1)


def _any_text_id(input_ids: torch.Tensor, kinds: torch.Tensor) -> int:
    """An id of the batch that is plain text: what the left padding is filled with (it is masked)."""
    return int(input_ids[kinds == TokenKind.TEXT][0])


def _key_values(model, state, per_row, placed, slots: int, last: int, tokens: int) -> DynamicCache:
    """The relocated blocks of every row, left-padded to ``slots``; fresh tensors, the given cache stays as it
    is. ``last`` is the largest position of the prompt, ``tokens`` its length with vision tokens.
    """
    past = DynamicCache()
    example = next((b for blocks in per_row for b in blocks), None)
    if example is None:
        return past
    backbone, text = state.family.backbone(model), state.family.text_model(model)
    weight = model.get_input_embeddings().weight
    relocator = relocator_for(state, text, backbone)
    chunk = state.family.chunk_size(model)
    relocator.check_range(last)
    relocator.check_length(tokens)
    rows = []
    for row, (blocks, places) in enumerate(zip(per_row, placed, strict=True)):
        keys: list[list[torch.Tensor]] = [[] for _ in range(example.num_layers)]
        values: list[list[torch.Tensor]] = [[] for _ in range(example.num_layers)]
        for number, (block, (position, order)) in enumerate(zip(blocks, places, strict=True)):
            if block.num_layers != example.num_layers or block.dtype != weight.dtype:
                raise ValueError(
                    f"sample {row}, block {number}: {block.num_layers} layers in {block.dtype}, the model "
                    f"has {example.num_layers} in {weight.dtype}; compress with this model, or cast with "
                    "cache.to(dtype)."
                )
            if position != block.position and not block.relocatable:
                raise ValueError(
                    f"sample {row}, block {number}: made with block_context='prefix' at position "
                    f"{block.position}, so it cannot stand at {position}; use the same prompt up to it, or "
                    "block_context='self'."
                )
            if chunk is not None and block.cuts(chunk, order) != block.cuts(chunk, block.order):
                raise ValueError(
                    f"sample {row}, block {number}: this backbone attends in chunks of {chunk} tokens, which "
                    f"cut the image differently at token {order} than at token {block.order}, where it was "
                    "compressed; compress it in this prompt."
                )
            block = block.to(weight.device)
            for layer, (key, value) in enumerate(zip(*relocator.move(block, position), strict=True)):
                keys[layer].append(key)
                values[layer].append(value)
        rows.append((keys, values))
    for layer in range(example.num_layers):
        parts = []
        for which, source in enumerate((example.keys, example.values)):
            heads, _, dim = source[layer].shape
            padded = []
            for row in rows:
                kept = row[which][layer]
                missing = slots - sum(t.shape[1] for t in kept)
                zeros = weight.new_zeros(heads, missing, dim)
                padded.append(torch.cat([zeros, *kept], dim=1))
            parts.append(torch.stack(padded))
        past.update(parts[0], parts[1], layer)
    return past
