"""Where the vision, VoCo and text tokens of a batch are, and the positions they get.

Shapes: ``B`` rows, ``N`` tokens a row, ``K`` VoCo tokens of a block.

    ids     s  a  v  v  v  C  C  b  c     one image, K = 2
    kind    T  T  V  V  V  C  C  T  T
    block  -1 -1  0  0  0  0  0 -1 -1
    seq.    0  1  2  3  4  5  6  7  8     positions="sequential"
    comp.   0  1 -1  0  1  2  3  4  5     positions="compact": V sits just before its C
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


class TokenKind:
    """What a token is to the isolation rule. Plain integers: an enum compared to a tensor breaks
    torch.compile.
    """

    PAD = 0
    TEXT = 1
    VISION = 2
    VOCO = 3


_GLUE = 4  # only inside parse: an ordinary text id that belongs to an image when it stands between its tiles


class LayoutError(ValueError):
    """The ids do not form ``[V, C]`` blocks and text; the message names sample and position."""


@dataclass(frozen=True)
class TokenVocabulary:
    """The ids by which a backbone's sequences are read.

    Args:
        voco_id: the VoCo token's id.
        placeholders: ids that the backbone replaces by image features.
        markers: ids its processor puts around them (tile, row, start and end markers): vision tokens where
            they touch a placeholder run.
        glue: ordinary text ids (a newline) that are part of an image only between two of its vision tokens.
        starts: markers that open a new image, so that two neighbouring images are two runs.
        edges: markers that open and close an image alike (Idefics3): between two side by side a new image
            begins.
        finals: markers of an image's last tile: glue after it is the user's text, not the image's.
        bos_id: the id of the BOS copy that opens a block under ``block_sink="bos"``; else ``None``.
    """

    voco_id: int
    placeholders: frozenset[int]
    markers: frozenset[int] = frozenset()
    glue: frozenset[int] = frozenset()
    starts: frozenset[int] = frozenset()
    edges: frozenset[int] = frozenset()
    finals: frozenset[int] = frozenset()
    bos_id: int | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values, for ``voco_config.json``."""
        return {
            "voco_id": self.voco_id,
            "placeholders": sorted(self.placeholders),
            "markers": sorted(self.markers),
            "glue": sorted(self.glue),
            "starts": sorted(self.starts),
            "edges": sorted(self.edges),
            "finals": sorted(self.finals),
            "bos_id": self.bos_id,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenVocabulary:
        """The vocabulary of ``values``, which :meth:`to_dict` gave."""
        sets = ("placeholders", "markers", "glue", "starts", "edges", "finals")
        fields: dict[str, Any] = {k: frozenset(v) if k in sets else v for k, v in values.items()}
        return cls(**fields)


@dataclass(frozen=True)
class BlockSpan:
    """One block ``[V, C]``: token positions ``start … voco-1`` are vision, ``voco … stop-1`` VoCo tokens."""

    row: int
    index: int
    start: int
    voco: int
    stop: int

    @property
    def num_vision(self) -> int:
        return self.voco - self.start

    @property
    def num_voco(self) -> int:
        return self.stop - self.voco


def among(ids: np.ndarray, values: Collection[int]) -> np.ndarray:
    """Which of ``ids`` are one of a few ``values`` (`np.isin` takes longer to begin than this to end)."""
    if len(values) > 16:
        return np.isin(ids, np.fromiter(values, dtype=np.int64))
    found = np.zeros(ids.shape, dtype=bool)
    for value in values:
        found |= ids == value
    return found


def _runs(codes: np.ndarray) -> list[list[int]]:
    """Run-length code of one row: ``[[code, start, stop], …]``."""
    edges = np.flatnonzero(np.diff(codes)) + 1
    starts = np.concatenate(([0], edges)) if len(codes) else np.empty(0, dtype=np.int64)
    stops = np.concatenate((edges, [len(codes)])) if len(codes) else starts
    return [[int(codes[a]), int(a), int(b)] for a, b in zip(starts, stops, strict=True)]


def _opens(ids: np.ndarray, vocab: TokenVocabulary) -> np.ndarray:
    """Where a new image begins within touching vision tokens ``(n,)``: a start marker, or two edges side by
    side.
    """
    opens = among(ids, vocab.starts)
    edge = among(ids, vocab.edges)
    opens[1:] |= edge[1:] & (ids[1:] == ids[:-1])
    return opens


def vision_runs(ids: np.ndarray, mask: np.ndarray, vocab: TokenVocabulary) -> list[tuple[int, int]]:
    """``(start, stop)`` of each run of vision tokens of one row (ids and mask of shape ``(N,)``).

    A run holds at least one placeholder; markers alone are text. Two images with start markers are two runs
    even where nothing stands between them.
    """
    codes = np.where(mask.astype(bool), TokenKind.TEXT, TokenKind.PAD)
    real = mask.astype(bool)
    codes[among(ids, vocab.glue) & real] = _GLUE
    codes[among(ids, vocab.placeholders | vocab.markers) & real] = TokenKind.VISION
    runs = _runs(codes)
    merged: list[list[int]] = []
    for position, (code, start, stop) in enumerate(runs):
        if code == _GLUE:
            between = 0 < position < len(runs) - 1
            flanked = between and runs[position - 1][0] == runs[position + 1][0] == TokenKind.VISION
            if flanked:  # past an image's last tile it is the user's own
                _, a, b = runs[position - 1]
                last = int(np.flatnonzero([True, *_opens(ids[a:b], vocab)[1:]])[-1])
                flanked = not among(ids[a + last : b], vocab.finals).any()
            code = TokenKind.VISION if flanked else TokenKind.TEXT
        if merged and merged[-1][0] == code == TokenKind.VISION:
            merged[-1][2] = stop
        else:
            merged.append([code, start, stop])
    found: list[tuple[int, int]] = []
    for code, start, stop in merged:
        if code != TokenKind.VISION:
            continue
        opens = _opens(ids[start:stop], vocab)
        cuts = [start, *(int(c) + start for c in np.flatnonzero(opens) if c > 0)]
        for a, b in zip(cuts, [*cuts[1:], stop], strict=True):
            if among(ids[a:b], vocab.placeholders).any():
                if vocab.bos_id is not None and a > 0 and ids[a - 1] == vocab.bos_id and mask[a - 1]:
                    a -= 1  # the block's own copy of BOS counts as a vision token
                found.append((a, b))
    return found


@dataclass
class SequenceLayout:
    """Kinds and blocks of a batch.

    Attributes:
        kind: ``(B, N)`` int64 on CPU, values of :class:`TokenKind`.
        block: ``(B, N)`` int64 on CPU, the block a vision or VoCo token belongs to, counted within its row;
            else -1.
        spans: every block, row by row, in order.
        ids: ``(B, N)`` int64 on CPU, what was read; ``None`` where no ids were.
    """

    kind: torch.Tensor
    block: torch.Tensor
    spans: list[BlockSpan] = field(default_factory=list)
    ids: torch.Tensor | None = None

    @classmethod
    def from_ids(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        vocab: TokenVocabulary,
        *,
        num_tokens: int | None = None,
        require_voco: bool = True,
    ) -> SequenceLayout:
        """Read the layout of ``input_ids`` ``(B, N)`` under the 2-D ``attention_mask`` ``(B, N)``.

        Args:
            vocab: the ids by which they are read.
            num_tokens: the least number of VoCo tokens each block must have; ``None`` takes any.
            require_voco: whether a vision run without VoCo tokens is an error.

        Raises:
            LayoutError: vision tokens with no VoCo run, a VoCo run with no vision tokens before it, a run
                shorter than ``num_tokens``, a block without its BOS sink; the message names sample and
                position.
        """
        if input_ids.ndim != 2:
            raise LayoutError(f"input_ids must have shape (batch, tokens), not {tuple(input_ids.shape)}.")
        if attention_mask is not None and tuple(attention_mask.shape) != tuple(input_ids.shape):
            raise LayoutError(
                f"attention_mask must be 2-D of shape {tuple(input_ids.shape)}, not "
                f"{tuple(attention_mask.shape)}."
            )
        ids, mask = on_cpu(input_ids, attention_mask)
        kind = np.where(mask, TokenKind.TEXT, TokenKind.PAD).astype(np.int64)
        block = np.full(ids.shape, -1, dtype=np.int64)
        spans: list[BlockSpan] = []
        for row in range(ids.shape[0]):
            spans += _read_row(
                row, ids[row], mask[row], vocab, kind[row], block[row], num_tokens, require_voco
            )
        return cls(torch.from_numpy(kind), torch.from_numpy(block), spans, torch.from_numpy(ids))

    @classmethod
    def of_text(cls, attention_mask: torch.Tensor) -> SequenceLayout:
        """The layout of plain text under the 2-D ``attention_mask`` ``(B, N)``."""
        real = attention_mask.detach().cpu().bool()
        kind = torch.where(real, TokenKind.TEXT, TokenKind.PAD)
        return cls(kind, torch.full_like(kind, -1))

    @property
    def num_rows(self) -> int:
        """``B``."""
        return self.kind.shape[0]

    @property
    def num_tokens(self) -> int:
        """``N``, padding included."""
        return self.kind.shape[1]

    def row_spans(self, row: int) -> list[BlockSpan]:
        """The blocks of one row, in order."""
        return [s for s in self.spans if s.row == row]

    @property
    def in_stream(self) -> torch.Tensor:
        """``(B, N)`` bool: the compressed stream, i.e. every real token that is not a vision token."""
        return (self.kind == TokenKind.TEXT) | (self.kind == TokenKind.VOCO)

    @property
    def has_vision(self) -> bool:
        """Whether any row holds a vision token."""
        return bool((self.kind == TokenKind.VISION).any())

    @property
    def begins_with_image(self) -> bool:
        """Whether the first real token of some row is a vision token."""
        real = self.kind != TokenKind.PAD
        first = self.kind.gather(1, real.int().argmax(dim=1, keepdim=True)) if real.numel() else self.kind
        return bool((first == TokenKind.VISION).any())

    @property
    def has_voco(self) -> bool:
        """Whether any row holds a VoCo token."""
        return bool((self.kind == TokenKind.VOCO).any())

    def __iter__(self) -> Iterator[BlockSpan]:
        return iter(self.spans)


def sent(value: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``value``, made a moment ago in the host's memory, on ``device``; an accelerator is not waited for.

    A copy out of pageable memory is staged before the call returns, so the host may go on and drop ``value``;
    a blocking one first lets the device finish all that is queued. To the CPU (and on MPS, where a copy that
    is not waited for can be read too early) it is the ordinary copy.
    """
    return value.to(device, non_blocking=torch.device(device).type not in ("cpu", "mps"))


def on_cpu(ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``(B, N)`` int64 and mask ``(B, N)`` bool as arrays, read from their device in one go."""
    if mask is None:
        read = ids.detach().long().cpu().numpy()
        return read, np.ones_like(read, dtype=bool)
    if ids.device.type == "cpu":
        return ids.detach().long().numpy(), mask.detach().cpu().numpy().astype(bool)
    read = torch.stack([ids.detach().long(), mask.detach().to(ids.device).long()]).cpu().numpy()
    return read[0], read[1].astype(bool)


def _read_row(row, ids, mask, vocab, kind, block, num_tokens, require_voco) -> list[BlockSpan]:
    kind[(ids == vocab.voco_id) & mask] = TokenKind.VOCO
    found = vision_runs(ids, mask, vocab)
    for start, stop in found:
        kind[start:stop] = TokenKind.VISION
    ends = {stop: start for start, stop in found}
    spans: list[BlockSpan] = []
    for code, start, stop in _runs(kind):
        if code != TokenKind.VOCO:
            continue
        if start not in ends:
            raise LayoutError(
                f"sample {row}, position {start}: {stop - start} VoCo token(s) with no vision tokens right "
                "before them; put the VoCo tokens directly after the image's last token."
            )
        if num_tokens is not None and stop - start < num_tokens:
            raise LayoutError(
                f"sample {row}, position {start}: {stop - start} VoCo token(s) where {num_tokens} were asked "
                f"for; put {num_tokens} after each image, or set num_tokens={stop - start}."
            )
        first = ends.pop(start)
        if vocab.bos_id is not None and ids[first] != vocab.bos_id:
            raise LayoutError(
                f"sample {row}, position {first}: block_sink='bos' wants a copy of the BOS token "
                f"({vocab.bos_id}) before each image's first token; let the collator put it there."
            )
        block[first:stop] = len(spans)
        spans.append(BlockSpan(row, len(spans), first, start, stop))
    if ends and require_voco:
        start = min(ends.values())
        raise LayoutError(
            f"sample {row}, position {start}: vision tokens with no VoCo tokens after them; put the VoCo "
            "tokens directly after each image (VoCoProcessor, VoCoDataCollator(voco=…) or "
            "model.insert_voco_tokens does)."
        )
    return spans


def sequential_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions of a 1-D backbone: real tokens counted from 0, padding at 0. ``(B, N)`` → ``(B, N)``
    int64.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def compact_positions(layout: SequenceLayout, sequential: torch.Tensor) -> torch.Tensor:
    """The stream numbered as if the vision tokens were not there; each block's V just before its C.

    Every block is shifted as a whole, so that all distances within it stay the backbone's own (RoPE is
    relative: what a block computes does not change).

    Args:
        sequential: the backbone's own positions, ``(B, N)`` or, for mrope, ``(P, B, N)``.

    Returns:
        positions of the same shape; those of a block's vision tokens may be negative.
    """
    device = sequential.device
    flat = sequential if sequential.dim() == 2 else sequential[0]
    stream = (layout.in_stream.long().cumsum(-1) - 1).clamp_min(0)
    like = torch.arange(layout.num_tokens).repeat(layout.num_rows, 1)  # whose shift each token takes
    for span in layout:
        like[span.row, span.start : span.stop] = span.voco
    shift = sent(stream, device) - flat
    return sequential + shift.gather(1, sent(like, device))


# -- inputs
# ------------------------------------------------------------------------------------------------------------


VISION_INPUTS = (
    "pixel_",
    "image_",
    "video_",
    "second_per_grid",
    "batch_num_images",
    "num_",
    "input_features",
)


def is_per_token(name: str, value: Any, shape: tuple[int, int]) -> bool:
    """Whether an input has a value for each token of the batch ``(R, N)``, and not that shape by accident."""
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
        return False
    return not (value.is_floating_point() or value.is_complex() or name.startswith(VISION_INPUTS))


# -- how batches are padded
# ------------------------------------------------------------------------------------------------------------


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def plain_processor(processor: Any) -> Any:
    """The processor that puts no VoCo tokens in: the one that a ``VoCoProcessor`` is made over, or itself."""
    plain = getattr(type(processor), "_voco_plain", None)
    return processor if plain is None else plain(processor)


def pad_id_of(processor: Any) -> int:
    """The id that ``processor`` pads with; 0 where its tokenizer has none (the attention mask hides it)."""
    return _id(getattr(tokenizer_of(processor), "pad_token_id", None))


def pad_id_of_model(model: Any) -> int:
    """The id that a transformers model pads with, from its config; 0 where it names none."""
    return _id(getattr(model.config.get_text_config(), "pad_token_id", None))


def _id(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def padding_side_of(attention_mask: torch.Tensor | None) -> str | None:
    """The side on which rows of ``attention_mask`` ``(B, N)`` are padded: ``left`` where one begins with
    padding, ``right`` where one ends with it, ``None`` where none is padded.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return "left" if bool((attention_mask[:, 0] == 0).any()) else "right"
