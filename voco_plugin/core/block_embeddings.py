"""The VoCo tokens' input embeddings, where these are more than the token's row: made of each block's image.

The class of the module that gets the merged embeddings is extended (``forward.py``), whatever the family. It
reads off them what the compressor wants and writes what it makes to the blocks' VoCo slots. Stage 1 and the
single pass go the same way; stage 2 holds no block and passes it by.

Shapes: ``B`` rows, ``N`` tokens a row, ``G`` blocks of one size, ``n`` image features and ``k`` VoCo tokens
of each, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .layout import BlockSpan, SequenceLayout, TokenKind, TokenVocabulary

NAME = "voco_compressor"
"""The module's name on the model, so the prefix of its weights in a checkpoint."""
QUESTION_MASK = "question_mask"
"""The batch key: ``(B, N)``, 1 where a token belongs to a question; wanted where labels hide an answer."""


@dataclass
class Places:
    """Where the blocks of one forward stand.

    Attributes:
        vision: per block, its row and the columns of its image features ``(n,)``.
        voco: per block, the columns of its VoCo tokens ``(k,)``.
        question: per block, the columns of the question behind it; empty where nothing reads it.
        pixels: per block its image, ``(blocks, C, S, S)``; ``None`` where nothing reads it.
        written: whether that was done.
    """

    vision: list[tuple[int, torch.Tensor]]
    voco: list[torch.Tensor]
    question: list[torch.Tensor]
    pixels: torch.Tensor | None = None
    written: bool = False


class MakesEmbeddings(Protocol):
    """What a forward asks of a compressor (:class:`~voco_plugin.models.compressors.Compressor`)."""

    reads_question: bool
    reads_pixels: bool

    def __call__(
        self, vision: torch.Tensor, rows: torch.Tensor, question: list[torch.Tensor] | None = None
    ) -> torch.Tensor: ...
    def features(self, model: Any, pixels: torch.Tensor, n: int, k: int) -> torch.Tensor: ...


class BlockEmbeddings:
    """Writes a compressor's embeddings; the compressor is a submodule of ``model``, so that it is saved,
    moved and trained with it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @property
    def compressor(self) -> MakesEmbeddings:
        return getattr(self.model, NAME)

    def places(
        self,
        layout: SequenceLayout,
        vocab: TokenVocabulary,
        question: torch.Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Places | None:
        """The blocks of ``layout``; ``None`` where there are none.

        Args:
            inputs: the forward's arguments, with the pixels.
            question: ``(B, N)``, which tokens are the question's; ``None``: all text behind a block.

        Raises:
            ValueError: the compressor reads the question, the model trains, and no one says which tokens
                are the question's (an answer would be read with it); or it reads pixels, and these are not
                one image a block.
        """
        if not layout.spans:
            return None
        reads = self.compressor.reads_question
        if reads and question is None and self.model.training:
            raise ValueError(
                f"this compressor reads the question, and without {QUESTION_MASK} it would read the answers "
                "with it; let VoCoDataCollator make the batch."
            )
        assert layout.ids is not None
        features = torch.isin(layout.ids, torch.tensor(sorted(vocab.placeholders)))
        text = layout.kind == TokenKind.TEXT
        if question is not None:
            text = text & question.cpu().bool()
        vision, voco, asked = [], [], []
        for span in layout:
            vision.append((span.row, _columns(features[span.row], span, span.start, span.voco)))
            voco.append(torch.arange(span.voco, span.stop))
            behind = (
                _columns(text[span.row], span, span.stop, layout.num_tokens) if reads else torch.arange(0)
            )
            asked.append(behind)
        return Places(vision, voco, asked, self._pixels(len(voco), inputs or {}))

    def _pixels(self, blocks: int, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Each block's image, where the compressor reads it: listed as the blocks stand, row by row."""
        if not self.compressor.reads_pixels:
            return None
        pixels = inputs.get("pixel_values")
        if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or len(pixels) != blocks:
            given = "none" if pixels is None else f"of shape {tuple(getattr(pixels, 'shape', ()))}"
            raise ValueError(
                f"this compressor reads the pixels of one image a block, and for {blocks} block(s) "
                f"pixel_values are {given}; give them as the processor lists them, and generate in two "
                "stages (the default), as one pass gets images that are encoded already."
            )
        return pixels

    def write(self, places: Places, embeddings: torch.Tensor) -> torch.Tensor:
        """``(B, N, D)`` with every block's VoCo slots written anew."""
        sizes: dict[tuple[int, int], list[int]] = {}
        for number, ((_, columns), voco) in enumerate(zip(places.vision, places.voco, strict=True)):
            sizes.setdefault((len(columns), len(voco)), []).append(number)
        rows, columns, made = [], [], []
        device = embeddings.device
        for members in sizes.values():
            row = torch.tensor([places.vision[m][0] for m in members], device=device)[:, None]
            seen = torch.stack([places.vision[m][1] for m in members]).to(device)
            slots = torch.stack([places.voco[m] for m in members]).to(device)
            question = None
            if self.compressor.reads_question:
                question = [embeddings[places.vision[m][0], places.question[m].to(device)] for m in members]
            own = embeddings[row[0], slots[0]]
            if places.pixels is None:
                vision = embeddings[row, seen]
            else:
                pixels = places.pixels[torch.tensor(members, device=places.pixels.device)]
                vision = self.compressor.features(self.model, pixels, seen.shape[1], slots.shape[1])
                vision = vision.to(embeddings.device, embeddings.dtype)
            new = self.compressor(vision, own, question)
            rows.append(row.expand_as(slots).reshape(-1))
            columns.append(slots.reshape(-1))
            made.append(new.reshape(-1, new.shape[-1]).to(embeddings.dtype))
        places.written = True
        return embeddings.index_put((torch.cat(rows), torch.cat(columns)), torch.cat(made))


def _columns(wanted: torch.Tensor, span: BlockSpan, start: int, stop: int) -> torch.Tensor:
    """The columns from ``start`` to ``stop`` that ``wanted`` ``(N,)`` names."""
    return torch.nonzero(wanted[start:stop]).flatten() + start
