"""Which rows of the vision inputs belong to which block, told only where it is sure.

A batch's vision inputs are tensors whose rows are images, tiles or patches of all blocks, in reading order.
To run some blocks without the others, their rows must be known. Each of these says them:

    images listed     as many rows as blocks with image tokens: one row a block
    grids             ``*_grid_thw``: patches a row = its product, image tokens in proportion to it
    equal units       rows that nothing tells apart (tiles of one size) have as many image tokens each
    images by row     Idefics: ``(batch rows, tiles, …)``; its real tiles, listed, are equal units

Every rule is checked against the image tokens that the blocks hold. Where none fits (a video whose frames are
blocks of their own, images of different sizes side by side, an input of unknown meaning), the blocks that
cannot be told apart stay together, and the reason is kept.

Shapes: ``n`` blocks, ``U`` units (images, tiles or videos), ``R`` rows of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.layout import VISION_INPUTS, BlockSpan, TokenVocabulary, sent

_SETTINGS = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")
_GRIDS = ("grid_thw", "grid_hws", "grid_hw")
_ENTRIES = "batch_num_images"  # one number per batch row that has images: its images are encoded by it


class Unclear(Exception):
    """The rows of an input cannot be given to blocks; the message says why."""


@dataclass
class Rows:
    """One vision input: ``offsets[b]`` is the first row of block ``b``, ``None`` where no row begins."""

    value: torch.Tensor
    offsets: list[int | None]
    stacked: bool = False

    def take(self, ranges: Sequence[tuple[int, int]]) -> torch.Tensor | None:
        """The rows of the blocks ``first … last-1`` of each range; ``None`` where that is none."""
        parts = [self.value[self.offsets[a] : self.offsets[b]] for a, b in ranges]
        parts = [p for p in parts if len(p)]
        if not parts:
            return None
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found[None] if self.stacked else found


@dataclass
class VisionInputs:
    """The vision inputs of a batch.

    Attributes:
        shared: arguments that every forward gets as they are.
        rows: the inputs that are cut, by name.
        bounds: where the blocks can be parted: ``0, …, n``. Blocks between two neighbours stay together.
        reason: why they cannot all be parted, or ``None``.
    """

    shared: dict[str, Any]
    rows: dict[str, Rows]
    bounds: list[int]
    reason: str | None = None

    @property
    def bundles(self) -> list[tuple[int, int]]:
        """``(first, stop)`` of the blocks that stay together."""
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))

    def take(self, bundles: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The arguments for these bundles alone."""
        joined: list[tuple[int, int]] = []
        for first, stop in bundles:
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((first, stop))
        taken = {name: rows.take(joined) for name, rows in self.rows.items()}
        return {**self.shared, **{name: value for name, value in taken.items() if value is not None}}


def vision_inputs(
    inputs: Mapping[str, Any],
    spans: Sequence[BlockSpan],
    vocab: TokenVocabulary,
    config: Any,
    *,
    by_row: bool = False,
) -> VisionInputs:
    """Read which rows of ``inputs`` belong to which of ``spans``.

    Args:
        inputs: ``input_ids`` ``(R, N)`` and the model's vision arguments; per-token tensors left out.
        config: the model's config, for the ids of image and video tokens.
        by_row: whether the family lays images out by batch row (Idefics).
    """
    ids = inputs["input_ids"]
    shared: dict[str, Any] = {}
    channels: dict[str, dict[str, torch.Tensor]] = {"image": {}, "video": {}}
    whole = {name: value for name, value in inputs.items() if name != "input_ids" and value is not None}
    try:
        for name, value in whole.items():
            if name in _SETTINGS or isinstance(value, (bool, int, float, str)):
                shared[name] = value
                continue
            if not name.startswith(VISION_INPUTS) and "pixel_" not in name:
                raise Unclear(f"{name} is an input of unknown meaning")
            if isinstance(value, torch.Tensor) and value.shape == ids.shape and not value.is_floating_point():
                raise Unclear(f"{name} has a value per token, or one row an image: its shape says both")
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                raise Unclear(f"{name} is a {type(value).__name__}, not a tensor with a row per image")
            video = "video" in name or name.startswith("second_per_grid")
            channels["video" if video else "image"][name] = value
        used = [name for name, tensors in channels.items() if tensors]
        rows: dict[str, Rows] = {}
        bounds = set(range(len(spans) + 1))
        reasons = []
        for channel in used:
            counts = _counts(ids, spans, _tokens(channel, len(used) > 1, vocab, config))
            cut = _cut(channels[channel], counts, spans, ids.shape[0], by_row and channel == "image")
            rows |= cut
            for name, found in cut.items():
                bounds -= {b for b, offset in enumerate(found.offsets) if offset is None}
                if any(offset is None for offset in found.offsets):
                    reasons.append(f"{name} has rows that more than one block shares")
        if not {0, len(spans)} <= bounds:
            raise Unclear("the image tokens do not begin and end with an image")
        return VisionInputs(shared, rows, sorted(bounds), reasons[0] if reasons else None)
    except Unclear as problem:
        return VisionInputs(whole, {}, [0, len(spans)], str(problem))


def _tokens(channel: str, both: bool, vocab: TokenVocabulary, config: Any) -> frozenset[int]:
    """The ids that a channel's features replace."""
    if not both:
        return vocab.placeholders
    names = ("video_token_id", "video_token_index")
    video = {v for n in names if isinstance(v := getattr(config, n, None), int)} & vocab.placeholders
    if not video or video == vocab.placeholders:
        raise Unclear("images and videos have no tokens of their own")
    return frozenset(video) if channel == "video" else vocab.placeholders - video


def _counts(ids: torch.Tensor, spans: Sequence[BlockSpan], tokens: frozenset[int]) -> list[int]:
    """How many tokens of ``tokens`` each block holds."""
    hits = torch.isin(ids, sent(torch.tensor(sorted(tokens)), ids.device)).long()
    before = torch.nn.functional.pad(hits.cumsum(dim=1), (1, 0)).tolist()
    return [before[s.row][s.voco] - before[s.row][s.start] for s in spans]


def _cut(
    tensors: dict[str, torch.Tensor], counts: list[int], spans: Sequence[BlockSpan], rows: int, by_row: bool
) -> dict[str, Rows]:
    """The offsets of every tensor of one channel."""
    if not sum(counts):
        raise Unclear(f"{next(iter(tensors))} is given, and no block has a token for it")
    if by_row:
        return _cut_by_row(tensors, counts, spans, rows)
    tensors = dict(tensors)
    entries = tensors.pop(_ENTRIES, None)
    grid_name = next((n for n in tensors if n.endswith(_GRIDS)), None)
    patches: list[int] = []
    if grid_name is not None:
        grid = tensors[grid_name]
        if grid.dim() != 2:
            raise Unclear(f"{grid_name} has the shape {tuple(grid.shape)}")
        units, patches = len(grid), grid.prod(dim=1).tolist()
    else:
        pixels = [n for n in tensors if "pixel_values" in n]
        if not pixels:
            raise Unclear(f"{next(iter(tensors))} comes without pixels")
        units = len(tensors[pixels[0]])
    facts, by_patch = {}, set()
    for name, value in tensors.items():
        if patches and "pixel_" in name and len(value) == sum(patches):
            by_patch.add(name)
        elif len(value) != units:
            raise Unclear(f"{name} has {len(value)} rows where {units} images or tiles are counted")
        elif "pixel_values" not in name:
            facts[name] = value
    for name in set(tensors) - by_patch - set(facts):
        _refuse_by_row(name, tensors[name], spans, rows)
    tags = _tags(facts, units)
    per_unit = _of_entries(entries, units)
    if per_unit:
        tags = [(*tag, number) for tag, number in zip(tags, per_unit, strict=True)]
    begins = _begins(counts, units, tags, patches if len(facts) <= 1 else [])
    if per_unit:  # whether an image is tiled depends on how many share its row: those stay together
        sums = _sums(entries.tolist())
        begins = [b if b in sums else None for b in begins]
    found: dict[str, Rows] = {}
    first = _sums(patches)
    for name, value in tensors.items():
        found[name] = Rows(
            value, [None if b is None else first[b] for b in begins] if name in by_patch else begins
        )
    if per_unit:
        found[_ENTRIES] = Rows(entries, [None if b is None else sums.index(b) for b in begins])
    return found


def _sums(values: Sequence[int]) -> list[int]:
    out = [0]
    for value in values:
        out.append(out[-1] + int(value))
    return out


def _of_entries(entries: torch.Tensor | None, units: int) -> list[int]:
    """Per image how many images its batch row has, from ``batch_num_images``."""
    if entries is None:
        return []
    if entries.dim() != 1 or int(entries.sum()) != units or int(entries.min()) < 1:
        raise Unclear(f"{_ENTRIES} counts {int(entries.sum())} images where {units} are given")
    return [n for n in entries.tolist() for _ in range(n)]


def _tags(facts: dict[str, torch.Tensor], units: int) -> list[tuple]:
    """Per unit a number for each fact known of it; equal where the fact is the same."""
    columns = [
        torch.unique(f.reshape(units, -1), dim=0, return_inverse=True)[1].tolist() for f in facts.values()
    ]
    return [tuple(column[u] for column in columns) for u in range(units)]


def _begins(counts: list[int], units: int, tags: list[tuple], patches: list[int]) -> list[int | None]:
    """``n + 1`` entries: the unit with which each block begins, ``None`` where none begins there."""
    total, ends = sum(counts), _sums(counts)
    if patches and all(p * total % sum(patches) == 0 for p in patches):
        at = {
            features: unit
            for unit, features in enumerate(_sums([p * total // sum(patches) for p in patches]))
        }
        return [at.get(end) for end in ends]
    filled = [c for c in counts if c]
    if units == len(filled):
        size: dict[tuple, int] = {}
        if any(size.setdefault(tag, count) != count for tag, count in zip(tags, filled, strict=True)):
            raise Unclear("images that are alike have different numbers of tokens")
        return list(_sums([int(c > 0) for c in counts]))
    each, rest = divmod(total, units)
    if rest or any(c % each for c in counts) or len(set(tags)) > 1:
        raise Unclear(
            f"{units} images or tiles stand for {len(filled)} blocks, and nothing tells whose they are"
        )
    return [end // each for end in ends]


def _refuse_by_row(name: str, value: torch.Tensor, spans: Sequence[BlockSpan], rows: int) -> None:
    """Refuse ``(R, tiles, 3, H, W)`` of a family that may list images or lay them out by batch row.

    Both come to the same where each row has one block. Else a row without a block would be padding, all
    zeros, if images were laid out by row.
    """
    if value.dim() != 5 or len(value) != rows:
        return
    having = [s.row for s in spans]
    if having == list(range(rows)):
        return
    without = sorted(set(range(rows)) - set(having))
    if not any(bool(value[r].any()) for r in without):
        raise Unclear(f"{name} has a row per batch row, and images may be listed or laid out by row")


def _cut_by_row(
    tensors: dict[str, torch.Tensor], counts: list[int], spans: Sequence[BlockSpan], rows: int
) -> dict[str, Rows]:
    """Idefics: the tiles that are not padding (all zeros, as its own forward tells them), listed."""
    pixels = tensors.get("pixel_values")
    if pixels is None or pixels.dim() != 5:
        raise Unclear("pixel_values is not laid out as (batch rows, tiles, 3, H, W)")
    for name, value in tensors.items():
        if value.dim() < 4 or value.shape[:2] != pixels.shape[:2]:
            raise Unclear(
                f"{name} has the shape {tuple(value.shape)} where pixel_values has {tuple(pixels.shape)}"
            )
    real = pixels.flatten(2).ne(0).any(dim=2)
    tiles, total = int(real.sum()), sum(counts)
    if len(pixels) != rows or not tiles or total % tiles or any(c % (total // tiles) for c in counts):
        raise Unclear(f"{tiles} tiles stand for {total} image tokens")
    each = total // tiles
    for row, number in enumerate(real.sum(dim=1).tolist()):
        if sum(c for c, s in zip(counts, spans, strict=True) if s.row == row) != number * each:
            raise Unclear(f"the {number} tiles of batch row {row} do not fit its image tokens")
    offsets: list[int | None] = [end // each for end in _sums(counts)]
    return {name: Rows(value[real], offsets, stacked=True) for name, value in tensors.items()}
