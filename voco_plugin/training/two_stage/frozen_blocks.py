"""Blocks of a training batch that no gradient reaches: read from a store, or computed as ``compress`` does
(paper, Sec. 3.4).

    (pixels, starting model, K) = key ──> store ──> block              nothing of the image is run
                                            └─ not there ──> [V C], adapter off ──> block ──> store

The model's stage 1 is frozen (``VoCoConfig.frozen_stage1``): it runs without the adapter that trains, so a
block is the same at every step, in every epoch and at inference.

Shapes: ``B`` rows, ``I`` images of the row with most, ``n`` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...cache.cache import VoCoBlock, VoCoCache
from ...cache.compress.batching import Limits, chunks_of
from ...cache.compress.stage_one import Batch, attention_of, run_alone
from ...store.store import VoCoCacheStore
from .streamed import Stream, batch_of, predicting, stream_on

IMAGE_KEYS = "voco_image_keys"
"""Key of a batch: the store's keys of its images, ``(B, I, 32)`` uint8, zeros where a row has fewer."""


def as_tensor(keys: list[list[str]]) -> torch.Tensor:
    """Keys (64 hex digits) of each row's images as ``(B, I, 32)`` uint8."""
    most = max(map(len, keys), default=0)
    out = torch.zeros(len(keys), most, 32, dtype=torch.uint8)
    for row, found in enumerate(keys):
        for place, key in enumerate(found):
            out[row, place] = torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)
    return out


@dataclass(frozen=True)
class FrozenBlocks:
    """Where blocks come from.

    Args:
        made_by: the fingerprint of the starting model's blocks, which the keys are made with.
        chunk: blocks that share a forward.
        store: what is read first, and gets what was not there, unless it is for reading; ``None``: none.
    """

    made_by: dict[str, Any]
    chunk: int
    store: VoCoCacheStore | None = None

    @torch.no_grad()
    def stream_of(
        self,
        model: torch.nn.Module,
        state: Any,
        inputs: dict[str, Any],
        labels: torch.Tensor | None,
        keys: torch.Tensor | None,
    ) -> Stream | None:
        """What stage 2 is to read of a batch; ``None`` where no row holds an image.

        Args:
            inputs: ``input_ids`` ``(B, N)`` with vision and VoCo tokens, ``attention_mask``, pixels.
            labels: ``(B, N)``.
            keys: :data:`IMAGE_KEYS` of the batch, where there is a store.

        Raises:
            ValueError: a label follows an image directly, or as
                :func:`~voco_plugin.training.two_stage.streamed.stream_of` says of labels and chunks; or the
                store holds an image's block as it is alone, which is not what it is in its row.
        """
        batch = batch_of(model, state, inputs)
        if batch is None:
            return None
        ends = predicting(batch, labels)
        if ends:
            span = batch.layout.spans[min(ends)]
            raise ValueError(
                f"sample {span.row}, position {span.stop}: a label follows an image directly, and its last "
                "VoCo token, read in the frozen stage 1, would predict it (inference refuses such a prompt); "
                "put text between image and answer, or use stage1=streamed."
            )
        return stream_on(batch, inputs, labels, self._cache(batch, inputs, keys), [])

    def _cache(self, batch: Batch, inputs: dict[str, Any], keys: torch.Tensor | None) -> VoCoCache:
        """The blocks of a batch, in order."""
        spans, attention = batch.layout.spans, None
        if batch.state.family.prefix_lm:
            attention = attention_of(inputs)
        named = self._named(batch, keys) if self.store is not None else [""] * len(spans)
        blocks: list[VoCoBlock | None] = [
            self._stored(batch, n, key, attention) for n, key in enumerate(named)
        ]
        missing = {n for n, block in enumerate(blocks) if block is None}
        for chunk in chunks_of(batch.model, spans, batch.vision, Limits(max_blocks=self.chunk), missing):
            numbers = [n for first, stop in chunk for n in range(first, stop)]
            for number, block in zip(numbers, run_alone(batch, chunk, numbers)[0], strict=True):
                blocks[number] = block
        if self.store is not None and missing and not self.store.readonly:
            made_by = self.made_by if attention is None else {**self.made_by, "attention": attention}
            new = {named[n]: blocks[n] for n in sorted(missing)}
            self.store.put_many(
                (k, VoCoCache([b], fingerprint=made_by)) for k, b in new.items() if b is not None
            )
        made = [block for block in blocks if block is not None]
        return VoCoCache(made, [s.row for s in spans], batch.layout.num_rows)

    def _named(self, batch: Batch, keys: torch.Tensor | None) -> list[str]:
        """The key of each block.

        Raises:
            ValueError: the batch has no keys, or not one a block; or its images are laid out by how many
                share their row.
        """
        if keys is None:
            raise ValueError(
                f"stage1_store needs {IMAGE_KEYS} in the batch, which VoCoDataCollator(made_by=…) puts "
                "there; leave data_collator out."
            )
        spans = batch.layout.spans
        counts = [len(batch.layout.row_spans(row)) for row in range(batch.layout.num_rows)]
        rows = [[bytes(key).hex() for key in row if any(key)] for row in keys.tolist()]
        if [len(row) for row in rows] != counts:
            raise ValueError(
                f"the rows hold {counts} blocks and {[len(row) for row in rows]} images; one block an image "
                "is what a store keeps: leave stage1_store out."
            )
        if "batch_num_images" in batch.vision.rows or "batch_num_images" in batch.vision.shared:
            shared = next((row for row, count in enumerate(counts) if count > 1), None)
            if shared is not None:
                raise ValueError(
                    f"sample {shared}: this family lays an image out by how many share its row, and a store "
                    "keeps the block of the image alone; leave stage1_store out."
                )
        left = [iter(row) for row in rows]
        return [next(left[span.row]) for span in spans]

    def _stored(self, batch: Batch, number: int, key: str, attention: str | None) -> VoCoBlock | None:
        """The block of a key, where it is in the store."""
        if self.store is None:
            return None
        try:
            cache = self.store.get(key)
        except KeyError:
            return None
        (block,) = cache
        span = batch.layout.spans[number]
        if (block.num_vision, block.num_tokens) != (span.num_vision, span.num_voco):
            raise ValueError(
                f"sample {span.row}: store {self.store.path} has this image as {block.num_vision} vision and "
                f"{block.num_tokens} VoCo tokens, and here it is {span.num_vision} and {span.num_voco}; "
                "leave stage1_store out, or make the store with this processor."
            )
        if attention is not None and cache.fingerprint.get("attention") != attention:
            raise ValueError(
                f"store {self.store.path} holds blocks read {cache.fingerprint.get('attention')}, and this "
                f"batch is read {attention} (its token types say so); leave stage1_store out."
            )
        return block


__all__ = ["IMAGE_KEYS", "FrozenBlocks", "as_tensor"]
