"""Packed rows: whole conversations side by side in one row, told apart by ``document_ids``.

Shapes: ``D`` documents (conversations) of up to ``L`` tokens, ``B`` packed rows of ``N`` tokens.

    documents    a a V V C b        (D, L)        row            a a V V C b c V V C .     (B, N)
                 c V V C                          document_ids   1 1 1 1 1 1 2 2 2 2 0

A document is as if it stood alone: it sees no other one, its positions start anew, its first token is not
predicted from the document before it. Neither a document nor a block is ever cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from .layout import BlockSpan, SequenceLayout, TokenKind, compact_positions
from .masks import TokenTable

if TYPE_CHECKING:
    from .attachment import Attachment

DOCUMENT_IDS = "document_ids"
"""The batch key: ``(B, N)`` int64, 0 for padding, else the number of the token's document in its row."""

# what padding gets in a packed row; a first token gets no label, as nothing before it predicts it
_PADDING = {
    "attention_mask": 0,
    "labels": -100,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "completion_mask": 0,
    "assistant_masks": 0,
}


def first_fit_decreasing(lengths: Sequence[int], capacity: int, seed: int = 0) -> list[list[int]]:
    """Which of ``lengths`` share a row of ``capacity`` tokens: longest first, each into the first row with
    room.

    Args:
        seed: in which order equal lengths are taken, so that neighbours in the data set do not stay
            neighbours. The same seed gives the same rows.

    Returns:
        indices into ``lengths``, row by row; every index once.

    Raises:
        ValueError: a length is not in ``1 … capacity``.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > capacity))
    if len(wrong):
        raise ValueError(f"length {sizes[wrong[0]]} at {wrong[0]} does not fit a row of {capacity} tokens.")
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)  # a tree: each node holds the most room of any row below it
    rows: list[list[int]] = []
    for index in order.tolist():
        size, node = int(sizes[index]), 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def pack_batch(
    batch: Mapping[str, Any],
    counts: Sequence[int],
    *,
    pad_token_id: int,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    images_by_row: bool = False,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The documents of a tokenized batch, laid side by side.

    Args:
        batch: ``input_ids`` and ``attention_mask`` ``(D, L)``, and any of ``labels``, ``token_type_ids``,
            ``mm_token_type_ids``, ``completion_mask``, ``assistant_masks`` of that shape. Pixels and grids
            are listed document after document, which is the reading order of the packed rows too. Not
            mutated.
        counts: how many documents each packed row takes, in order; they sum to ``D``.
        images_by_row: pixels are ``(D, tiles, …)`` with tiles of zeros as padding (Idefics 3): those of one
            packed row are put side by side.
        names: how errors call the documents.

    Returns:
        a new dict: the per-token tensors at ``(B, N)`` with padding on the right, and ``document_ids``.

    Raises:
        ValueError: the documents of a row have more than ``max_length`` tokens together, or ``counts`` does
            not sum to ``D``.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if sum(counts) != len(ids) or min(counts, default=1) < 1:
        raise ValueError(f"counts={list(counts)} must be at least 1 each and sum to {len(ids)} documents.")
    names = [f"sample {i}" for i in range(len(ids))] if names is None else names
    sizes = mask.sum(dim=1).tolist()
    groups, at = [], 0
    for count in counts:
        groups.append(range(at, at + count))
        at += count
    widths = [sum(sizes[i] for i in group) for group in groups]
    for group, width in zip(groups, widths, strict=True):
        if max_length is not None and width > max_length:
            raise ValueError(
                f"{', '.join(names[i] for i in group)}: {width} tokens in a row of max_length={max_length}, "
                "and packing never cuts a conversation; raise max_length, or leave it out."
            )
    out = dict(batch)
    for name, pad in {"input_ids": pad_token_id, **_PADDING}.items():
        value = batch.get(name)
        if value is None:
            continue
        if name == "labels":
            value = value.clone()
            first = mask.long().argmax(dim=1)
            value[torch.arange(len(value)), first] = -100
        out[name] = _side_by_side(value[mask], widths, pad, pad_to_multiple_of)
    numbers = [n for group in groups for n, i in enumerate(group, 1) for _ in range(sizes[i])]
    out[DOCUMENT_IDS] = _side_by_side(torch.tensor(numbers), widths, 0, pad_to_multiple_of)
    if images_by_row and batch.get("pixel_values") is not None:
        out |= _tiles_by_row(batch, groups)
    return out


def _side_by_side(flat: torch.Tensor, widths: list[int], pad: int, multiple: int | None) -> torch.Tensor:
    """``(ΣN,)`` cut into rows of ``widths`` → ``(B, N)``, padded on the right."""
    rows = pad_sequence(list(flat.split(widths)), batch_first=True, padding_value=pad)
    missing = -rows.shape[1] % multiple if multiple else 0
    return torch.nn.functional.pad(rows, (0, missing), value=pad)


def _tiles_by_row(batch: Mapping[str, Any], groups: list[range]) -> dict[str, torch.Tensor]:
    """``(D, tiles, …)`` → ``(B, tiles, …)``: the tiles of a row's documents, without the padding between."""
    pixels = batch["pixel_values"]
    held = [row.flatten(1).any(dim=1).nonzero().flatten() for row in pixels]
    ends = [int(tiles[-1]) + 1 if len(tiles) else 0 for tiles in held]
    found = {}
    for name in ("pixel_values", "pixel_attention_mask"):
        value = batch.get(name)
        if value is not None:
            rows = [torch.cat([value[i, : ends[i]] for i in group]) for group in groups]
            found[name] = pad_sequence(rows, batch_first=True)
    return found


class Documents:
    """The documents of packed rows, read from ``document_ids`` ``(B, N)``.

    Attributes:
        ids: ``(B, N)`` int64, as given.
        real: ``(B, N)`` bool, tokens of any document.
        mask: ``(D, L)`` bool, the same tokens with a row for each document, padded on the right.
        row: ``(D,)`` int64, the packed row of each document.

    Raises:
        ValueError: another shape than the tokens', a negative number, or a document in pieces.
    """

    def __init__(self, ids: torch.Tensor, shape: Sequence[int]) -> None:
        if not isinstance(ids, torch.Tensor) or tuple(ids.shape) != tuple(shape):
            raise ValueError(
                f"{DOCUMENT_IDS} must have the shape of input_ids, {tuple(shape)}, not "
                f"{tuple(getattr(ids, 'shape', ()))}."
            )
        self.ids = ids.long()
        self.real = self.ids > 0
        before = torch.nn.functional.pad(self.ids, (1, 0))[:, :-1]
        starts = (self.ids != before) & self.real
        row, column = starts.nonzero(as_tuple=True)
        pairs = torch.stack([row, self.ids[row, column]])
        if bool((self.ids < 0).any()) or pairs.unique(dim=1).shape[1] != pairs.shape[1]:
            raise ValueError(
                f"{DOCUMENT_IDS} must number each row's documents 1, 2, …, every document in one piece, and "
                "padding 0."
            )
        self.row = row
        number = starts[self.real].long().cumsum(0) - 1
        self.sizes = torch.bincount(number, minlength=len(row)).tolist()
        steps = torch.arange(max(self.sizes, default=0), device=ids.device)
        self.mask = steps < torch.tensor(self.sizes, device=ids.device)[:, None]

    def split(self, value: torch.Tensor, fill: int) -> torch.Tensor:
        """``(B, N)`` → ``(D, L)``: each document a row of its own."""
        out = value.new_full(self.mask.shape, fill)
        out[self.mask] = value[self.real]
        return out

    def join(self, value: torch.Tensor, fill: int) -> torch.Tensor:
        """``(…, D, L)`` → ``(…, B, N)``: the documents back where they stand."""
        out = value.new_full((*value.shape[:-2], *self.ids.shape), fill)
        out[..., self.real.to(value.device)] = value[..., self.mask.to(value.device)]
        return out


# -- a packed forward


@dataclass
class PackedForward:
    """A packed forward, each document laid out, numbered and isolated as if it stood alone.

    Attributes:
        kwargs: its keyword arguments, without ``document_ids``.
        positions: ``(B, N)`` or ``(P, B, N)``, the rule's.
        table: of the packed rows.
        layout: of the packed rows, blocks numbered through each row.
        blocks: the same with the blocks as spans of the packed rows, and their ids.
    """

    kwargs: dict[str, Any]
    positions: torch.Tensor
    table: TokenTable
    layout: SequenceLayout
    blocks: SequenceLayout


def prepare_packed(
    attachment: Attachment, backbone: torch.nn.Module, kwargs: dict[str, Any], past: Any = None
) -> PackedForward:
    """Take packed rows apart into their documents, one row each, and put back what is found of them where
    they stand. So mrope positions, which are counted image by image with the grids, need nothing of their
    own.

    Raises:
        ValueError: a KV cache or chunked attention beside packed rows, ``input_ids`` left out, or
            ``document_ids`` that do not number the documents of ``attention_mask``.
    """
    kwargs = dict(kwargs)
    ids, input_ids = kwargs.pop(DOCUMENT_IDS), kwargs.get("input_ids")
    if isinstance(past, Cache) and past.get_seq_length():
        raise ValueError(f"{DOCUMENT_IDS} were given beside a filled KV cache; packed rows have no past.")
    if input_ids is None:
        raise ValueError(f"{DOCUMENT_IDS} need input_ids; inputs_embeds do not show where images are.")
    family, config, vocab = attachment.family, attachment.config, attachment.vocab
    check_packs(family, backbone)
    documents = Documents(ids.to(input_ids.device), input_ids.shape)
    mask = kwargs.get("attention_mask")
    if mask is not None and not (
        isinstance(mask, torch.Tensor)
        and mask.shape == input_ids.shape
        and bool((mask.bool() == documents.real).all())
    ):
        raise ValueError(
            f"attention_mask must be the 2-D padding mask, 1 just where {DOCUMENT_IDS} is not 0."
        )
    alone = documents.split(input_ids, vocab.voco_id)
    own_mask = documents.mask.long()
    read = config.rule != "causal" or attachment.embeddings is not None
    found = SequenceLayout.from_ids(alone, own_mask, vocab) if read else SequenceLayout.of_text(own_mask)
    layout = found if config.rule != "causal" else SequenceLayout.of_text(own_mask)
    more = {
        name: documents.split(value, 0)
        if name.endswith("token_type_ids") and isinstance(value, torch.Tensor)
        else value
        for name, value in kwargs.items()
    }
    positions = family.sequential(backbone, alone, own_mask, more).to(input_ids.device)
    if config.positions == "compact":
        positions = compact_positions(layout, positions)
    whole = _layout_side_by_side(layout, documents)
    rows, tokens = input_ids.shape
    order = torch.arange(tokens, device=input_ids.device).expand(rows, tokens)
    kind, block = (value.to(input_ids.device) for value in (whole.kind, whole.block))
    table = TokenTable(kind, block, order, documents.ids, ordered=True)
    kwargs["attention_mask"] = documents.real.long()
    spans = in_packed_rows(found.spans, documents) if read else []
    kinds = documents.join(found.kind, TokenKind.PAD)
    blocks = SequenceLayout(kinds, kinds, spans, input_ids.detach().long().cpu())
    return PackedForward(kwargs, documents.join(positions, 0), table, whole, blocks)


def check_packs(family: Any, model: torch.nn.Module) -> None:
    """Refuse a model whose attention a packed row would change.

    Raises:
        ValueError: chunked attention (Llama 4), whose chunks are counted from the row's first token.
    """
    chunk = family.chunk_size(model)
    if chunk is not None:
        raise ValueError(
            f"{type(model).__name__} attends in chunks of {chunk} tokens, counted from a row's start, so a "
            "packed document would be cut elsewhere than alone; train it without packing."
        )


def _layout_side_by_side(layout: SequenceLayout, documents: Documents) -> SequenceLayout:
    """The layout of the packed rows, blocks numbered through each row."""
    block = layout.block.clone()
    done: dict[int, int] = {}
    for document, row in enumerate(documents.row.tolist()):
        before = done.get(row, 0)
        inside = block[document] >= 0
        block[document][inside] += before
        done[row] = before + (int(layout.block[document].max()) + 1 if bool(inside.any()) else 0)
    return SequenceLayout(documents.join(layout.kind, 0), documents.join(block, -1))


def in_packed_rows(spans: Sequence[BlockSpan], documents: Documents) -> list[BlockSpan]:
    """The blocks of documents laid out alone, where they stand in the packed rows (``packing.Documents``)."""
    starts: list[int] = []
    filled: dict[int, int] = {}
    for row, size in zip(documents.row.tolist(), documents.sizes, strict=True):
        real = documents.real[row].nonzero().flatten()
        starts.append(int(real[filled.get(row, 0)]))
        filled[row] = filled.get(row, 0) + size
    found: list[BlockSpan] = []
    for span in spans:
        row, shift = int(documents.row[span.row]), starts[span.row]
        moved = (span.start + shift, span.voco + shift, span.stop + shift)
        found.append(BlockSpan(row, len(found), *moved))
    return found
