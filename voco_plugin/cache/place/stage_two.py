"""Stage 2 (paper, Sec. 3.3, Fig. 4): the blocks' keys and values as a KV prefix, the text after them.

Per row the KV cache holds ``[padding, C of every block, text …]``: the blocks come first whatever their place
in the stream. Where each stands in the sequence is kept beside the cache, so that a text token sees only
blocks before it. One row, K = 2, ``positions="compact"``, an image of 9 vision tokens (``C`` stands in the
prompt for a block):

    stream      s  a  C  C  b  c
    position    0  1  2  3  4  5        sequential: C at 11, 12
    order       0  1 11 12 13 14        indices in the whole sequence, vision tokens counted
    slot        2  3  0  1  4  5        the KV cache holds the blocks first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Cache
from transformers.utils import logging

from ...core.attachment import input_device
from ...core.kv_cache import KVSlots, VoCoKVCache
from ...core.layout import TokenKind, among, on_cpu, sent
from ...core.masks import TokenTable
from ..cache import VoCoBlock, VoCoCache
from ..fingerprint import check_cache, differences_to_reader
from .relocation import RelocationError, relocator_for

_log = logging.get_logger(__name__)
_NONLINEAR = {"dynamic": "dynamic NTK scaling", "longrope": "longrope"}


@dataclass
class Placed:
    """What stage 2 runs on. ``B`` rows, ``S`` stream tokens, ``T`` text tokens (left-padded), ``P`` cached
    slots.

    Attributes:
        input_ids: ``(B, T)``, the stream without its VoCo tokens.
        attention_mask: ``(B, P + T)``.
        position_ids: ``(B, T)``.
        past: the placed blocks.
        columns: ``(B, T)``, the stream column of each text token; -1 for padding.
        text: ``(3, n)`` on the CPU, of every text token: its row, its column here, its column in the stream.
        ends_with_text: whether every row's last real token is text.
        whole_last_column: whether every row's last text token is the stream's last column.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    past: VoCoKVCache
    columns: torch.Tensor
    text: torch.Tensor
    ends_with_text: bool
    whole_last_column: bool


def _rows_of_blocks(cache: VoCoCache, rows: int) -> list[list[VoCoBlock]]:
    if cache.num_rows == rows:
        return [[b for b, r in zip(cache.blocks, cache.rows, strict=True) if r == row] for row in range(rows)]
    if cache.num_rows == 1:
        return [list(cache.blocks)] * rows  # one set of images, many prompts
    raise ValueError(
        f"the cache holds {cache.num_rows} rows and input_ids {rows}; give one row of blocks per prompt."
    )


def place(
    model,
    state,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: VoCoCache,
    token_types: torch.Tensor | None = None,
    before: Cache | None = None,
    trusted: bool = False,
) -> Placed:
    """Put ``cache`` under the stream ``input_ids`` ``(B, S)``.

    Args:
        token_types: ``(B, S)``, a prefix-LM's ``token_type_ids`` of the stream; ``None`` takes all of it for
            the prefix where stage 1 was given token types, as the processor does for a prompt.
        before: a KV cache that the stream goes on from (of ``model.prefix_cache``, or of an earlier turn), of
            one row or ``B``; it is not changed. ``P`` counts its slots.
        trusted: whether the blocks were made by this model a moment ago, in the forward that runs (training),
            or were checked before: neither fingerprint nor dtype is compared, and under autocast they differ.

    Raises:
        ValueError: another model's cache, another K, blocks and VoCo tokens that do not match, vision tokens
            in the stream, a row without text, or a block that cannot be moved to where the prompt puts it.
    """
    mine = {} if trusted else check_cache(model, state, cache)
    rows, columns = input_ids.shape
    device = input_ids.device
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if tuple(mask.shape) != (rows, columns):
        raise ValueError(f"attention_mask must be 2-D of shape {(rows, columns)}, not {tuple(mask.shape)}.")
    kinds = _kinds(state.vocab, input_ids, mask)
    last = np.where(kinds != TokenKind.PAD, np.arange(columns), -1).max(axis=1)
    per_row = _rows_of_blocks(cache, rows)
    past = _Past.of(before, mine, rows)
    compact = state.config.positions == "compact"
    plans = [
        plan_row(r, kinds[r], per_row[r], compact, past.next_position[r], past.next_order[r])
        for r in range(rows)
    ]
    empty = next((r for r, plan in enumerate(plans) if not len(plan.columns)), None)
    if empty is not None:
        raise ValueError(
            f"sample {empty}: the prompt holds no text token to answer from; add one after the images."
        )

    text_length = max(len(plan.columns) for plan in plans)
    slots = max((sum(b.num_tokens for b in blocks) for blocks in per_row), default=0)
    text = np.full((3, rows, text_length), 0, dtype=np.int64)  # source column, position, order
    text[0] = -1
    held = np.zeros((3, rows, slots), dtype=np.int64)  # kind, block, order of the blocks' slots
    held[0], held[1] = TokenKind.PAD, -1
    for row, plan in enumerate(plans):
        pad = text_length - len(plan.columns)
        text[:, row, pad:] = plan.columns, plan.positions, plan.orders
        counts = np.array([b.num_tokens for b in per_row[row]], dtype=np.int64)
        slot = slots - int(counts.sum())
        held[0, row, slot:] = TokenKind.VOCO
        held[1, row, slot:] = np.repeat(np.arange(len(counts)), counts) + past.num_blocks[row]
        first = np.repeat(np.cumsum(counts) - counts, counts)
        held[2, row, slot:] = np.repeat(plan.block_orders, counts) + np.arange(counts.sum()) - first
    if before is None:
        # a chunked backbone counts its chunks from the mask's first real slot, and slots before it as order
        filled = np.concatenate([held[0] != TokenKind.PAD, text[0] >= 0], axis=1)
        leading = filled.argmax(axis=1)[:, None]
        held[2] += leading
        text[2] += leading
    dtype = None if trusted else model.get_input_embeddings().weight.dtype
    _check_reach(model, state, plans, per_row, int(text[1].max()), int(text[2].max()) + 1, dtype)
    key_values = _key_values(model, state, per_row, plans, slots, before)

    source, position_ids, orders = sent(torch.from_numpy(text), device)
    table = past.table.append(TokenTable(*torch.from_numpy(held))).to(device)
    text_kind = torch.where(source >= 0, TokenKind.TEXT, TokenKind.PAD)
    planned = TokenTable(text_kind, torch.full_like(text_kind, -1), orders)
    ids = torch.where(source >= 0, input_ids.gather(1, source.clamp_min(0)), _any_text_id(input_ids, kinds))
    counted = [len(blocks) for blocks in per_row]
    key_values.voco_slots = KVSlots(
        table=table,
        next_position=sent(torch.tensor([plan.end for plan in plans]), device),
        next_order=orders[:, -1] + 1,
        num_blocks=sent(torch.from_numpy(past.num_blocks + counted), device),
        planned=planned,
        planned_positions=position_ids,
        planned_prefix=_prefix(state, cache, table, source, token_types),
        open_to_text=past.open_to_text and not (state.config.hide_prefix or state.family.windowed(model)),
        full=past.full and bool((held[0] != TokenKind.PAD).all() and (text[0] >= 0).all()),
    )
    key_values.voco_made_by = mine
    full_mask = torch.cat([table.kind != TokenKind.PAD, source >= 0], dim=1).long()
    row, place = np.nonzero(text[0] >= 0)
    return Placed(
        ids, full_mask, position_ids, key_values, source,
        torch.from_numpy(np.stack([row, place, text[0][row, place]])),
        bool((kinds[np.arange(rows), last] == TokenKind.TEXT).all()),
        bool((text[0][:, -1] == columns - 1).all()),
    )  # fmt: skip


def _kinds(vocab, input_ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """:class:`TokenKind` of the stream's tokens ``(B, S)``, on the CPU."""
    ids, real = on_cpu(input_ids, mask)
    vision = among(ids, vocab.placeholders) & real
    if vision.any():
        row, column = (int(v) for v in np.argwhere(vision)[0])
        raise ValueError(
            f"sample {row}, position {column}: the stream holds an image token; with voco_cache the prompt "
            "holds only text and VoCo tokens (model.stream_inputs drops the vision tokens)."
        )
    kinds = np.where(real, TokenKind.TEXT, TokenKind.PAD)
    return np.where((ids == vocab.voco_id) & real, TokenKind.VOCO, kinds).astype(np.int64)


@dataclass
class _Past:
    """What stands in the KV cache before the stream: ``B`` rows, on the CPU."""

    table: TokenTable
    next_position: np.ndarray
    next_order: np.ndarray
    num_blocks: np.ndarray
    open_to_text: bool
    full: bool

    @classmethod
    def of(cls, before: Cache | None, mine: dict[str, Any], rows: int) -> _Past:
        if before is None:
            none = torch.zeros(rows, 0, dtype=torch.long)
            zeros = np.zeros(rows, dtype=np.int64)
            return cls(TokenTable(none, none, none), zeros, zeros, zeros, True, True)
        held = KVSlots.of(before)
        if held is None:
            raise ValueError(
                "prefix_cache holds a KV cache of which nothing is known; make it with model.prefix_cache."
            )
        wrong = differences_to_reader(mine, before.voco_made_by or {})
        if wrong:
            raise ValueError(
                "prefix_cache was not made by this model under this rule; make it again with "
                f"model.prefix_cache: {'; '.join(wrong)}."
            )
        if held.table.num_rows not in (1, rows):
            raise ValueError(f"prefix_cache holds {held.table.num_rows} rows and input_ids {rows}.")
        held.check(before.get_seq_length(), held.table.num_rows)
        held = held.repeated(rows // held.table.num_rows)
        if held.planned is not None:
            raise ValueError("prefix_cache belongs to a prompt that has not been read to its end.")
        return cls(
            held.table.to("cpu"),
            *(v.cpu().numpy() for v in (held.next_position, held.next_order, held.num_blocks)),
            held.open_to_text,
            held.full,
        )


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


def _any_text_id(input_ids: torch.Tensor, kinds: np.ndarray) -> torch.Tensor:
    """An id of the batch that is plain text: what the left padding is filled with (it is masked)."""
    row, column = np.argwhere(kinds == TokenKind.TEXT)[0]
    return input_ids[row, column]


def _check_reach(
    model, state, plans: list[RowPlan], per_row, last: int, tokens: int, dtype: torch.dtype | None
) -> None:
    """Refuse what no rotation can give. ``last`` is the largest position of the prompt, ``tokens`` its length
    with vision tokens, ``dtype`` what blocks must be in (``None``: anything).
    """
    if not any(per_row):
        return
    chunk = state.family.chunk_size(model)
    example = next(b for blocks in per_row for b in blocks)
    far = max(b.position + b.num_tokens - 1 for blocks in per_row for b in blocks)
    _check_lengths(state.family.text_model(model), max(last, far), tokens)
    for row, (plan, blocks) in enumerate(zip(plans, per_row, strict=True)):
        for number, block in enumerate(blocks):
            position, order = int(plan.block_positions[number]), int(plan.block_orders[number])
            if block.num_layers != example.num_layers or block.dtype != (dtype or block.dtype):
                raise ValueError(
                    f"sample {row}, block {number}: {block.num_layers} layers in {block.dtype}, the model "
                    f"has {example.num_layers} in {dtype}; compress with this model, or cast with "
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


def _check_lengths(text: torch.nn.Module, last: int, tokens: int) -> None:
    """Refuse a prompt that goes on to position ``last`` and has ``tokens`` tokens where what a layer computes
    depends on either.

    Raises:
        RelocationError: dynamic NTK past its maximum, longrope past its original length: the whole sequence
            would be computed with other frequencies than a block alone was. Temperature tuning by slot (Llama
            4), where slots differ between one pass and two stages.
    """
    config = text.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and last >= limit:
        _log.warning_once(  # once a message
            f"this prompt reaches position {last}, and the model was trained up to {limit} "
            "(max_position_embeddings): what it answers may be worse."
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = parameters.values() if all(isinstance(v, dict) for v in parameters.values()) else [parameters]
    for values in sets:
        kind = (values or {}).get("rope_type") if isinstance(values, dict) else None
        if kind not in _NONLINEAR:
            continue
        limit = config.max_position_embeddings
        if kind == "longrope":
            original = values.get("original_max_position_embeddings")
            limit = original or getattr(config, "original_max_position_embeddings", limit)
        if last >= limit:
            raise RelocationError(
                f"{_NONLINEAR[kind]} changes its frequencies past {limit} positions, so a cached block "
                f"cannot stand in a stream that reaches position {last}; keep the stream below {limit}."
            )
    tuned = getattr(config, "attn_temperature_tuning", 0)
    scale = getattr(config, "floor_scale", None) if tuned else None
    if scale and tokens >= scale:
        raise RelocationError(
            f"{type(text).__name__} scales queries by their slot from token {int(scale)} on, and the prompt "
            f"has {tokens} with its vision tokens: slots differ in stage 2; shorten the prompt, or use "
            "generate(…, two_stage=False)."
        )


def _key_values(model, state, per_row, plans: list[RowPlan], slots: int, before: Cache | None) -> VoCoKVCache:
    """``before`` and the relocated blocks of every row, left-padded to ``slots``; fresh tensors, what was
    given stays as it is.
    """
    past = VoCoKVCache()
    device = input_device(model)
    if before is not None:
        for index, layer in enumerate(before.layers):
            rows = len(per_row) // layer.keys.shape[0]
            past.update(layer.keys.repeat_interleave(rows, 0), layer.values.repeat_interleave(rows, 0), index)
    # a block that stands at one place in many rows is moved once
    columns: dict[tuple[int, int], int] = {}
    chosen: list[VoCoBlock] = []
    deltas: list[int] = []
    index = np.full((len(per_row), slots), -1, dtype=np.int64)
    for row, (blocks, plan) in enumerate(zip(per_row, plans, strict=True)):
        slot = slots - sum(b.num_tokens for b in blocks)
        for block, position in zip(blocks, plan.block_positions.tolist(), strict=True):
            count = block.num_tokens
            start = columns.setdefault((id(block), position), len(deltas))
            if start == len(deltas):
                chosen.append(block)
                deltas += [position - block.position] * count
            index[row, slot : slot + count] = np.arange(start, start + count)
            slot += count
    if not chosen:
        return past
    layers = range(chosen[0].num_layers)
    tensors = tuple(
        [torch.cat([getattr(b, name)[layer].to(device) for b in chosen], dim=1) for layer in layers]
        for name in ("keys", "values")
    )
    if any(deltas):
        relocator = relocator_for(state, state.family.text_model(model), state.family.backbone(model))
        tensors = relocator.move(tensors, sent(torch.tensor(deltas), device))
    gather = sent(torch.from_numpy(np.where(index < 0, len(deltas), index)), device)
    in_order = len(per_row) == 1 and bool((index == np.arange(slots)).all())
    for layer in layers:
        past.update(*(_laid_out(t[layer], gather, in_order) for t in tensors), layer)
    return past


def _laid_out(flat: torch.Tensor, gather: torch.Tensor, in_order: bool) -> torch.Tensor:
    """``(B, H, slots, D)`` of the tokens ``flat`` ``(H, T, D)`` that ``gather`` ``(B, slots)`` names; ``T``
    stands for padding.
    """
    if in_order:
        return flat[None]
    padded = torch.nn.functional.pad(flat, (0, 0, 0, 1))
    return padded[:, gather].transpose(0, 1).contiguous()


# -- one row: arithmetic on positions and indices, no model
# ------------------------------------------------------------------------------------------------------------


@dataclass
class RowPlan:
    """One row of the stream: ``T`` text tokens, ``n`` blocks.

    Attributes:
        columns, positions, orders: ``(T,)`` int64, of each text token: its column in the stream, its
            position, its index in the whole sequence.
        block_positions, block_orders: ``(n,)`` int64, of each block's first VoCo token.
        end: position after the row's last token.
    """

    columns: np.ndarray
    positions: np.ndarray
    orders: np.ndarray
    block_positions: np.ndarray
    block_orders: np.ndarray
    end: int


def plan_row(
    row: int,
    kinds: np.ndarray,
    blocks: Sequence[VoCoBlock],
    compact: bool,
    position: int = 0,
    order: int = 0,
) -> RowPlan:
    """The places of one row's tokens.

    Args:
        row: its number, for messages.
        kinds: ``(S,)``, :class:`~voco_plugin.core.layout.TokenKind` of the stream's tokens (padding
        anywhere). compact: whether vision tokens take no position.
        position, order: of the row's first token; more than 0 where a KV cache stands before it.

    Raises:
        ValueError: VoCo tokens and blocks do not match; the message names sample and position.
    """
    real = kinds != TokenKind.PAD
    is_voco = kinds == TokenKind.VOCO
    starts = _block_starts(row, is_voco, blocks)
    # every token advances both counts by one; a block's first VoCo token also by what its vision tokens take
    extra_position, extra_order = np.zeros_like(kinds), np.zeros_like(kinds)
    if len(blocks):
        extra_order[starts] = [b.num_vision for b in blocks]
        if not compact:
            extra_position[starts] = [b.extent for b in blocks]
    count = np.cumsum(real) - 1
    positions = position + count + np.cumsum(extra_position)
    orders = order + count + np.cumsum(extra_order)
    columns = np.flatnonzero(kinds == TokenKind.TEXT)
    end = int(positions[real][-1]) + 1 if real.any() else position
    return RowPlan(columns, positions[columns], orders[columns], positions[starts], orders[starts], end)


def _block_starts(row: int, is_voco: np.ndarray, blocks: Sequence[VoCoBlock]) -> np.ndarray:
    """The column of each block's first VoCo token ``(n,)``."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], is_voco.astype(np.int8), [0]))))
    starts: list[int] = []
    for first, stop in edges.reshape(-1, 2).tolist():
        start = first
        while start < stop:
            if len(starts) == len(blocks) and start > first:
                kept = sorted({b.num_tokens for b in blocks})
                raise ValueError(
                    f"sample {row}, position {first}: {stop - first} VoCo tokens stand together and the "
                    f"cache holds blocks of K={', '.join(map(str, kept))}: this prompt was made for another "
                    "K; put as many VoCo tokens as each block has."
                )
            if len(starts) == len(blocks):
                raise ValueError(
                    f"sample {row}, position {start}: a VoCo token with no block for it; the cache holds "
                    f"{len(blocks)} block(s) for this row."
                )
            wanted = blocks[len(starts)].num_tokens
            if stop - start < wanted:
                raise ValueError(
                    f"sample {row}, position {start}: {stop - start} VoCo token(s) for block {len(starts)}, "
                    f"which holds {wanted}; use {wanted} in the prompt, or cache.first({stop - start})."
                )
            starts.append(start)
            start += wanted
    if len(starts) < len(blocks):
        raise ValueError(
            f"sample {row}: the cache holds {len(blocks)} block(s) and the prompt VoCo tokens for "
            f"{len(starts)}; put each block's VoCo tokens into the prompt, or take a part of the cache "
            "(cache[:n])."
        )
    return np.asarray(starts, dtype=np.int64)
