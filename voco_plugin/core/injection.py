"""Puts VoCo tokens into tokenized batches, and cuts batches without cutting through a block.

Shapes: ``B`` rows, ``N`` tokens a row, ``K`` VoCo tokens of a block, ``M`` tokens a row afterwards.

    before   s v v v a b v v . .        two images, right padding
    after    s v v v C C a b v v C C    K = 2;  block_sink="bos" also puts a copy of BOS before each image

Everything is done by one plan per row: where each new token comes from (an old position, or nowhere), which
every per-token tensor of the batch then follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .layout import LayoutError, SequenceLayout, TokenKind, TokenVocabulary, among, vision_runs

_VOCO, _BOS, _PAD = -1, -2, -3  # codes in a plan, where a token has no old position

# what a new VoCo or BOS token, and what padding, gets; a type id of 0 is text for every family
_FILLS: dict[str, tuple[int, int]] = {
    "attention_mask": (1, 0),
    "labels": (-100, -100),
    "token_type_ids": (0, 0),
    "mm_token_type_ids": (0, 0),
    "completion_mask": (0, 0),
    "assistant_masks": (0, 0),
}
_REFUSED = {
    "position_ids": "positions are counted by the backbone after the VoCo tokens are in",
    "inputs_embeds": "VoCo tokens are put in by id",
}
_NOT_PER_TOKEN = (
    "pixel_",
    "image_",
    "video_",
    "input_features",
    "second_per_grid",
    "batch_num_images",
    "num_",
)


def insert_voco_tokens(
    batch: Mapping[str, Any],
    vocab: TokenVocabulary,
    num_tokens: int | Sequence[int],
    *,
    pad_token_id: int,
    padding_side: str,
    images_per_row: Sequence[int] | None = None,
    pad_to_multiple_of: int | None = None,
    names: Sequence[str] | None = None,
    fills: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Put K copies of the VoCo token right after each image or video of a tokenized batch.

    A block that has its VoCo tokens already is left as it is. Rows without vision tokens keep theirs. Padding
    is taken off first and put back to the longest row.

    Args:
        batch: ``input_ids`` ``(B, N)``, and any of ``attention_mask``, ``labels``, ``token_type_ids``,
            ``mm_token_type_ids``, ``completion_mask``, ``assistant_masks`` of that shape; whatever is not
            counted in tokens (pixels, grids) passes through. Not mutated.
        vocab: the ids by which the sequences are read; with a ``bos_id``, each block also gets its own copy
            of BOS.
        num_tokens: K, for all rows or one per row.
        pad_token_id: what ``input_ids`` get at padding.
        padding_side: where the result is padded, ``left`` or ``right``.
        images_per_row: how many images each row holds, ``(B,)``; needed only to tell neighbouring images
            apart where the backbone writes no marker between them.
        pad_to_multiple_of: round ``M`` up to a multiple of this.
        names: how errors call the rows; default ``sample 0``, ``sample 1``, …
        fills: other per-token tensors ``(B, N, …)`` by name, and what a VoCo token and padding get in each.

    Returns:
        a new dict: the per-token tensors at ``(B, M)``, always with an ``attention_mask``, and the rest
        untouched.

    Raises:
        LayoutError: a block has another K already, a VoCo token stands elsewhere, or neighbouring images
            cannot be told apart; the message names sample and position.
        ValueError: a per-token tensor that cannot be extended (``position_ids``), or an argument out of
            range.
    """
    ids, mask = _ids_and_mask(batch)
    names = [f"sample {row}" for row in range(len(ids))] if names is None else names
    counts = [num_tokens] * len(ids) if isinstance(num_tokens, int) else [int(k) for k in num_tokens]
    if len(counts) != len(ids) or any(k < 1 for k in counts):
        raise ValueError(
            f"num_tokens={num_tokens!r} must be at least 1, one number or one per row ({len(ids)} rows)."
        )
    if images_per_row is not None and len(images_per_row) != len(ids):
        raise ValueError(
            f"images_per_row has {len(images_per_row)} entries for {len(ids)} rows; give one per row."
        )
    if images_per_row is None:
        images_per_row = _images_side_by_side(batch, ids, mask, vocab)
    plans, first_image = [], 0
    for row in range(len(ids)):
        images = None if images_per_row is None else int(images_per_row[row])
        same_size = images is not None and _same_size(batch, first_image, images)
        first_image += images or 0
        plans.append(_insertion_plan(ids[row], mask[row], vocab, counts[row], images, same_size, names[row]))
    return _follow(batch, plans, vocab, pad_token_id, padding_side, pad_to_multiple_of, fills)


def _images_side_by_side(
    batch: Mapping[str, Any], ids: np.ndarray, mask: np.ndarray, vocab: TokenVocabulary
) -> list[int] | None:
    """How many images a batch of one row has, where pixels of more are there than runs of vision tokens and
    no marker tells them apart; else ``None``.

    Raises:
        LayoutError: so has a batch of several rows: two of its images would be read as one.
    """
    sizes = batch.get("image_sizes", batch.get("pixel_values"))
    marked = vocab.markers | vocab.starts | vocab.edges
    if not isinstance(sizes, torch.Tensor) or among(ids, marked).any():
        return None
    runs = sum(len(vision_runs(one, real, vocab)) for one, real in zip(ids, mask, strict=True))
    if len(sizes) <= runs or among(ids, frozenset({vocab.voco_id})).any():
        return None
    if len(ids) == 1:
        return [len(sizes)]
    raise LayoutError(
        f"the batch has {len(sizes)} images in {runs} run(s) of vision tokens, with nothing to tell where "
        "one ends; put text (a line break will do) between the images of a row, or give images_per_row, or "
        "one row at a time."
    )


def remove_voco_tokens(
    batch: Mapping[str, Any],
    vocab: TokenVocabulary,
    *,
    pad_token_id: int,
    padding_side: str,
) -> dict[str, Any]:
    """Undo :func:`insert_voco_tokens`: the prompts as the original model reads them (LM_o of Eq. 1).

    VoCo tokens go, and with a ``bos_id`` in ``vocab`` each block's own copy of BOS; all else stays, in order.

    Args:
        batch: as :func:`insert_voco_tokens` returns it; not mutated.
        padding_side: where the result is padded, ``left`` or ``right``.

    Returns:
        a new dict, padded to its longest row.

    Raises:
        LayoutError: the ids do not form blocks.
    """
    ids, mask = _ids_and_mask(batch)
    layout = SequenceLayout.from_ids(batch["input_ids"], torch.from_numpy(mask), vocab, require_voco=False)
    kept = mask & (layout.kind.numpy() != TokenKind.VOCO)
    if vocab.bos_id is not None:
        for span in layout:
            kept[span.row, span.start] = False
    plans = [np.flatnonzero(row) for row in kept]
    return _follow(batch, plans, vocab, pad_token_id, padding_side, None)


def truncate(
    batch: Mapping[str, Any],
    vocab: TokenVocabulary,
    max_length: int,
    *,
    pad_token_id: int,
    padding_side: str,
    pad_to_multiple_of: int | None = None,
    names: Sequence[str] | None = None,
    fills: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Keep the first ``max_length`` tokens of each row; only text after a row's last block may go.

    Args:
        batch: as :func:`insert_voco_tokens` returns it; not mutated.
        names: how errors call the rows; default ``sample 0``, ``sample 1``, …
        fills: as in :func:`insert_voco_tokens`.

    Raises:
        LayoutError: the cut would fall inside a block or before one; the message names the sample and its
            length.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1, or None for no limit.")
    ids, mask = _ids_and_mask(batch)
    plans = []
    for row in range(len(ids)):
        real = np.flatnonzero(mask[row])
        needed = _blocks_end(ids[row][real], vocab)
        if len(real) > max_length and needed > max_length:
            name = f"sample {row}" if names is None else names[row]
            raise LayoutError(
                f"{name}: its last image ends at token {needed} of {len(real)}, beyond "
                f"max_length={max_length}, and an image is never cut; set max_length to at least {needed}, "
                "or None."
            )
        plans.append(real[:max_length])
    return _follow(batch, plans, vocab, pad_token_id, padding_side, pad_to_multiple_of, fills)


def _ids_and_mask(batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    ids = batch["input_ids"]
    if ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (batch, tokens), not {tuple(ids.shape)}.")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be 2-D of shape {tuple(ids.shape)}, not {tuple(mask.shape)}.")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return ids.detach().cpu().numpy(), real.cpu().numpy()


def _blocks_end(ids: np.ndarray, vocab: TokenVocabulary) -> int:
    """How many of the unpadded ``ids`` ``(n,)`` reach to the end of the last block; 0 without one."""
    runs = vision_runs(ids, np.ones_like(ids, dtype=bool), vocab)
    end = runs[-1][1] if runs else 0
    return end + _leading(ids[end:], vocab.voco_id) if runs else 0


def _leading(ids: np.ndarray, value: int) -> int:
    """How many copies of ``value`` open ``ids``."""
    other = np.flatnonzero(ids != value)
    return int(other[0]) if len(other) else len(ids)


def _same_size(batch: Mapping[str, Any], first: int, count: int) -> bool:
    """Whether images ``first … first+count-1`` have equal sizes, as far as the processor says them."""
    for name in ("image_sizes", "image_grid_thw"):
        sizes = batch.get(name)
        if sizes is not None:
            sizes = torch.as_tensor(sizes).reshape(-1, torch.as_tensor(sizes).shape[-1])[
                first : first + count
            ]
            return len(sizes) == count and bool((sizes == sizes[:1]).all())
    return True


def _split(
    ids: np.ndarray, runs: list[tuple[int, int]], images: int | None, same_size: bool, name: str
) -> list[tuple[int, int]]:
    """Runs cut into one per image, where a run holds several images whose tokens are all the same."""
    if images is None or images <= len(runs) or not runs:
        return runs
    length, rest = divmod(sum(stop - start for start, stop in runs), images)
    sure = same_size and not rest and not any((stop - start) % length for start, stop in runs)
    pieces = [(a, a + length) for start, stop in runs for a in range(start, stop, length)] if sure else []
    if not sure or any((ids[a:b] != ids[pieces[0][0] : pieces[0][1]]).any() for a, b in pieces):
        raise LayoutError(
            f"{name}, position {runs[0][0]}: {images} images in {len(runs)} run(s) of vision tokens, with "
            "nothing to tell where one ends; put text (a line break will do) between the images."
        )
    return pieces


def _insertion_plan(
    row_ids: np.ndarray,
    row_mask: np.ndarray,
    vocab: TokenVocabulary,
    count: int,
    images: int | None,
    same_size: bool,
    name: str,
) -> np.ndarray:
    """Where each token of the new row comes from, ``(m,)``: an old position, ``_VOCO`` or ``_BOS``."""
    real = np.flatnonzero(row_mask)
    ids = row_ids[real]
    runs = vision_runs(ids, np.ones_like(ids, dtype=bool), replace(vocab, bos_id=None))
    pieces: list[np.ndarray] = []
    done, seen = 0, 0
    for start, stop in _split(ids, runs, images, same_size, name):
        present = _leading(ids[stop:], vocab.voco_id)
        position = int(real[stop - 1]) + 1
        if present not in (0, count):
            raise LayoutError(
                f"{name}, position {position}: the image has {present} VoCo token(s) already where {count} "
                f"were asked for; leave them out of the text, or set num_tokens={present}."
            )
        sink = vocab.bos_id is not None
        if present and sink and (start == 0 or ids[start - 1] != vocab.bos_id):
            raise LayoutError(
                f"{name}, position {int(real[start])}: block_sink='bos' wants a copy of the BOS token "
                f"({vocab.bos_id}) before an image that has its VoCo tokens already; leave them out of the "
                "text."
            )
        pieces.append(real[done:start])
        if sink and not present:
            pieces.append(np.array([_BOS]))
        pieces.append(real[start:stop])
        if not present:
            pieces.append(np.full(count, _VOCO))
        done, seen = stop, seen + present
    if int((ids == vocab.voco_id).sum()) != seen:
        stray = [i for i in np.flatnonzero(ids == vocab.voco_id) if not _follows(ids, i, runs, vocab.voco_id)]
        raise LayoutError(
            f"{name}, position {int(real[stray[0]])}: a VoCo token that follows no image; take it out of "
            "the text."
        )
    pieces.append(real[done:])
    return np.concatenate(pieces).astype(np.int64)


def _follows(ids: np.ndarray, index: int, runs: list[tuple[int, int]], voco_id: int) -> bool:
    """Whether the VoCo token at ``index`` belongs to the VoCo tokens right after a run."""
    return any(stop <= index < stop + _leading(ids[stop:], voco_id) for _, stop in runs)


def _follow(
    batch: Mapping[str, Any],
    plans: list[np.ndarray],
    vocab: TokenVocabulary,
    pad_token_id: int,
    padding_side: str,
    multiple: int | None,
    fills: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The batch with every per-token tensor rebuilt after ``plans``, one per row."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r} is not known; use 'left' or 'right'.")
    length = max((len(plan) for plan in plans), default=0)
    if multiple:
        length = -(-length // multiple) * multiple
    table = np.full((len(plans), length), _PAD, dtype=np.int64)
    for row, plan in enumerate(plans):
        where = slice(0, len(plan)) if padding_side == "right" else slice(length - len(plan), length)
        table[row, where] = plan
    ids = batch["input_ids"]
    source = torch.from_numpy(table).to(ids.device)
    out = dict(batch)
    new_ids = _take(ids, source, 0, pad_token_id)
    new_ids[source == _VOCO] = vocab.voco_id
    if vocab.bos_id is not None:
        new_ids[source == _BOS] = vocab.bos_id
    out["input_ids"] = new_ids
    out["attention_mask"] = _take(batch.get("attention_mask", torch.ones_like(ids)), source, 1, 0)
    for name, value in batch.items():
        if name in ("input_ids", "attention_mask") or value is None:
            continue
        if name in _REFUSED:
            raise ValueError(f"the batch holds {name!r}, but {_REFUSED[name]}; leave it out.")
        if name in _FILLS:
            if value.shape != ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids, {tuple(ids.shape)}, not {value.shape}."
                )
            out[name] = _take(value, source, *_FILLS[name])
        elif fills is not None and name in fills:
            if tuple(value.shape[:2]) != tuple(ids.shape):
                raise ValueError(
                    f"{name} must begin with the shape of input_ids, {tuple(ids.shape)}, not "
                    f"{tuple(value.shape)}."
                )
            out[name] = _take(value, source, fills[name], fills[name])
        elif _looks_per_token(name, value, ids):
            raise ValueError(
                f"the batch holds {name!r}, one value per token, and what a VoCo token gets there is not "
                f"known; leave it out, or rename it to one of {', '.join(_FILLS)}."
            )
    return out


def _take(value: torch.Tensor, source: torch.Tensor, new: float, pad: float) -> torch.Tensor:
    """``value`` ``(B, N, …)`` taken at ``source`` ``(B, M)``; ``new`` and ``pad`` where that names no
    position.
    """
    if value.shape[1] == 0:
        return value.new_full((*source.shape, *value.shape[2:]), pad)
    source = source.to(value.device)
    at = source.clamp_min(0).reshape(*source.shape, *(1 for _ in value.shape[2:]))
    out = torch.gather(value, 1, at.expand(*source.shape, *value.shape[2:]))
    out[(source == _VOCO) | (source == _BOS)] = new
    out[source == _PAD] = pad
    return out


def _looks_per_token(name: str, value: Any, ids: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() >= 2
        and value.shape[:2] == ids.shape
        and not name.startswith(_NOT_PER_TOKEN)
    )
