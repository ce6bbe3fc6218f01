"""Both stages in one training forward (paper, Sec. 3.4): blocks in chunks, then the stream on top of them.

    chunk 0   [V C][V C]  ──┐ keys and values of C, every layer
    chunk 1   [V C][V C]  ──┤ (each chunk under a checkpoint: its activations go, and come back one chunk at a
    …                       │  time in the backward pass)
    stream    t t C C C C … t t     text tokens, on the blocks as their past

What it gives is what one pass under the rule gives, and so are its gradients: a block sees itself alone, and
text sees of a block only its VoCo tokens. Memory is one chunk's activations, the stream's, and K tokens' keys
and values a block.

Shapes: ``B`` rows of ``N`` tokens, ``S`` of them in the stream, ``T`` of these text; ``n`` blocks, ``d``
width, ``P`` slots of blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ...cache.cache import VoCoCache
from ...cache.compress.batching import Limits, chunks_of
from ...cache.compress.stage_one import Batch, attention_of, read_batch, run_alone
from ...cache.place.stage_two import Placed, place
from ...core.forward import as_cache
from ...core.layout import SequenceLayout, TokenKind, sent
from .read_only_cache import read_only


@dataclass
class Stream:
    """A batch as stage 2 reads it.

    Attributes:
        inputs: what the backbone is given: ``input_ids`` ``(B, T)``, ``attention_mask`` ``(B, P + T)``, the
            blocks as its cache, token types where the batch has them.
        labels: ``(B, S)``, right-padded; those of VoCo tokens are -100.
        placed: where its tokens stand.
        ends: per block whose last VoCo token predicts a label: row, column of the stream, and the hidden
            state of stage 1 ``(d,)``.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor | None
    placed: Placed
    ends: list[tuple[int, int, torch.Tensor]]

    def hidden(self, text: torch.Tensor) -> torch.Tensor:
        """``(B, S, d)``, what predicts the labels, of the text tokens' ``(B, T, d)``; 0 where nothing is
        predicted.
        """
        assert self.labels is not None
        row, at, column = self.placed.text.to(text.device)
        rows, columns, made = [row], [column], [text[row, at]]
        if self.ends:
            rows.append(row.new_tensor([end[0] for end in self.ends]))
            columns.append(row.new_tensor([end[1] for end in self.ends]))
            made.append(torch.stack([end[2] for end in self.ends]).to(text.dtype))
        whole = text.new_zeros(*self.labels.shape, text.shape[-1])
        return whole.index_put((torch.cat(rows), torch.cat(columns)), torch.cat(made))


def compacted(value: torch.Tensor, keep: torch.Tensor, fill: int) -> torch.Tensor:
    """The kept entries of ``value`` ``(B, N)``, in order, right-padded with ``fill``: ``(B, S)``."""
    length = int(keep.sum(dim=1).max())
    order = torch.argsort((~keep).long(), dim=1, stable=True)[:, :length]
    return torch.where(keep.gather(1, order), value.gather(1, order), fill)


def blocks_in_chunks(
    batch: Batch, blocks_per_chunk: int, wanted: set[int]
) -> tuple[VoCoCache, dict[int, torch.Tensor]]:
    """Stage 1, a chunk at a time; where gradients are recorded, each chunk is recomputed in the backward
    pass.

    Args:
        wanted: the blocks whose last VoCo token's hidden state ``(d,)`` is given too, by number.
    """
    spans, batch.replayed = batch.layout.spans, True
    blocks: list[Any] = [None] * len(spans)
    ends: dict[int, torch.Tensor] = {}
    for chunk in chunks_of(batch.model, spans, batch.vision, Limits(max_blocks=blocks_per_chunk)):
        numbers = [n for first, stop in chunk for n in range(first, stop)]
        run = functools.partial(_chunk, batch, chunk, numbers, wanted.intersection(numbers))
        if torch.is_grad_enabled():
            made, found = checkpoint(run, use_reentrant=False)
        else:
            made, found = run()
        for number, block in zip(numbers, made, strict=True):
            blocks[number] = block
        ends |= found
    return VoCoCache(blocks, [s.row for s in spans], batch.positions.shape[-2]), ends


def _chunk(
    batch: Batch, chunk: list[tuple[int, int]], numbers: list[int], wanted: set[int]
) -> tuple[list[Any], dict[int, torch.Tensor]]:
    blocks, hidden = run_alone(batch, chunk, numbers, read_on=bool(wanted))
    if hidden is None:
        return blocks, {}
    spans = batch.layout.spans
    last = {n: spans[n].num_vision + spans[n].num_voco - 1 for n in wanted}
    return blocks, {n: hidden[row, last[n]] for row, n in enumerate(numbers) if n in wanted}


def stream_of(
    model: torch.nn.Module,
    state: Any,
    inputs: dict[str, Any],
    labels: torch.Tensor | None,
    blocks_per_chunk: int,
) -> Stream | None:
    """Stage 1 of a batch, and what stage 2 is to read; ``None`` where no row holds an image.

    Args:
        inputs: ``input_ids`` ``(B, N)`` with vision and VoCo tokens, ``attention_mask``, pixels.
        labels: ``(B, N)``.
        blocks_per_chunk: blocks that share a forward.

    Raises:
        ValueError: image tokens have labels, or a row's first token has one and padding before it, which one
            pass would predict from padding; or the images of a batch cannot be told apart into such chunks.
    """
    batch = batch_of(model, state, inputs)
    if batch is None:
        return None
    ends = predicting(batch, labels)
    cache, hidden = blocks_in_chunks(batch, blocks_per_chunk, set(ends))
    return stream_on(batch, inputs, labels, cache, [(*ends[n], hidden[n]) for n in ends])


def batch_of(model: torch.nn.Module, state: Any, inputs: dict[str, Any]) -> Batch | None:
    """A batch as stage 1 reads it; ``None`` where no row holds an image."""
    layout = SequenceLayout.from_ids(inputs["input_ids"], inputs.get("attention_mask"), state.vocab)
    return read_batch(model, state, inputs, layout) if layout.spans else None


def predicting(batch: Batch, labels: torch.Tensor | None) -> dict[int, tuple[int, int]]:
    """The blocks whose last VoCo token predicts a label: number → row, column in the stream.

    Raises:
        ValueError: as :func:`stream_of` says of labels.
    """
    if labels is None:
        return {}
    first = sent(torch.tensor(batch.starts.first_real), labels.device)[:, None]
    orphan = (labels.gather(1, first) != -100) & (first > 0)
    if bool(orphan.any()):
        raise ValueError(
            f"sample {int(orphan.any(dim=1).nonzero()[0])}: its first token has a label and padding before "
            "it, so nothing predicts it; mask that label (-100), or pad on the right."
        )
    vision = (batch.layout.kind == TokenKind.VISION).to(labels.device)
    if bool(((labels != -100) & vision).any()):
        raise ValueError(
            "image tokens have labels (TRL labels every token of a conversation), and in two stages nothing "
            "predicts them; set assistant_only_loss=True, or give prompt and completion."
        )
    column, labelled = batch.layout.in_stream.long().cumsum(dim=1) - 1, (labels != -100).cpu()
    found = {}
    for number, span in enumerate(batch.layout.spans):
        if span.stop < labels.shape[1] and bool(labelled[span.row, span.stop]):
            found[number] = (span.row, int(column[span.row, span.stop - 1]))
    return found


def stream_on(
    batch: Batch,
    inputs: dict[str, Any],
    labels: torch.Tensor | None,
    cache: VoCoCache,
    ends: list[tuple[int, int, torch.Tensor]],
) -> Stream:
    """The stream of a batch on the blocks of ``cache``, which are those of its images, in order."""
    keep = batch.layout.in_stream.to(batch.positions.device)
    ids = compacted(inputs["input_ids"], keep, 0)
    mask = compacted(keep.long(), keep, 0)
    types = None
    if batch.state.family.prefix_lm:
        cache.fingerprint["attention"] = attention_of(inputs)
        types = inputs.get("token_type_ids")
        types = None if types is None else compacted(types, keep, 0)
    placed = place(batch.model, batch.state, ids, mask, cache, types, trusted=True)
    given = {
        "input_ids": placed.input_ids, "attention_mask": placed.attention_mask,
        **as_cache(read_only(placed.past)),
    }  # fmt: skip
    if types is not None:
        given["token_type_ids"] = types.gather(1, placed.columns.clamp_min(0))
    return Stream(given, None if labels is None else compacted(labels, keep, -100), placed, ends)
