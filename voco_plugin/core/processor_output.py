"""VoCo tokens in what a processor returned: as tensors of PyTorch or NumPy, or as lists, padded or not.

Shapes: ``B`` rows, ``N`` tokens a row, ``M`` tokens a row afterwards.

    lists of different lengths, or arrays  →  tensors (B, N)  →  insertion, cut, padding (B, M)  →  as it came
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .injection import insert_voco_tokens, truncate
from .layout import TokenVocabulary, padding_side_of

_FILLS = {"offset_mapping": 0, "special_tokens_mask": 1}
"""What a tokenizer gives per token besides what models take, and what a VoCo token gets there."""
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", *_FILLS)
_SIZES = ("image_sizes", "image_grid_thw")  # they tell neighbouring images apart


@dataclass(frozen=True)
class Lengths:
    """How long rows are to be, VoCo tokens counted.

    Attributes:
        padded: whether rows of lists are padded to one length; tensors always are.
        padding_side: ``left`` or ``right``; the batch's own, where it shows one, is taken instead.
        pad_token_id: what padding is filled with.
        limit: rows are cut to this many tokens, never through an image; ``None``: none is cut.
        pad_to: rows are padded to this many tokens, where none is longer.
        multiple: rows are padded to a multiple of this.
    """

    padded: bool
    padding_side: str
    pad_token_id: int
    limit: int | None = None
    pad_to: int | None = None
    multiple: int | None = None


def holds_images(output: Mapping[str, Any], vocab: TokenVocabulary) -> bool:
    """Whether any row has vision or VoCo tokens."""
    ids = output["input_ids"]
    found = (
        set(np.concatenate([np.atleast_1d(np.asarray(row)) for row in ids]).tolist()) if len(ids) else set()
    )
    return not found.isdisjoint(vocab.placeholders | {vocab.voco_id})


def insert_into_output(
    output: Mapping[str, Any],
    vocab: TokenVocabulary,
    num_tokens: int | Sequence[int],
    lengths: Lengths,
    images_per_row: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A processor's output with VoCo tokens after each image, in the containers that it came in.

    Args:
        output: not mutated; ``input_ids`` of ``B`` rows, as a tensor, an array or lists.
        images_per_row: as in :func:`~voco_plugin.core.injection.insert_voco_tokens`.

    Returns:
        a new dict with ``attention_mask``; lists that were of different lengths stay so.

    Raises:
        LayoutError: as :func:`~voco_plugin.core.injection.insert_voco_tokens` and ``truncate``.
        ValueError: ``input_ids`` are in another container.
    """
    ids = output["input_ids"]
    if not isinstance(ids, (torch.Tensor, np.ndarray, list, tuple)):
        raise ValueError(
            f"VoCo tokens cannot be put into input_ids of type {type(ids).__name__}; ask the processor for "
            "return_tensors='pt' or 'np', or leave it out."
        )
    flat = isinstance(ids, (list, tuple)) and len(ids) > 0 and isinstance(ids[0], int)
    names = [name for name in _PER_TOKEN if output.get(name) is not None]
    batch = {name: _as_tensor([output[name]] if flat else output[name]) for name in names}
    ragged = False
    if isinstance(ids, (list, tuple)):
        real = _as_tensor([[1] * len(row) for row in ([ids] if flat else ids)])
        ragged = not bool(real.all())
        batch["attention_mask"] = batch.get("attention_mask", 1) * real
    side = None if ragged else padding_side_of(batch.get("attention_mask"))
    shape: dict[str, Any] = {
        "pad_token_id": lengths.pad_token_id,
        "padding_side": side or lengths.padding_side,
        "fills": _FILLS,
    }
    sizes = {name: output[name] for name in _SIZES if output.get(name) is not None}
    made = insert_voco_tokens({**batch, **sizes}, vocab, num_tokens, images_per_row=images_per_row, **shape)
    longest = int(made["attention_mask"].sum(1).max())
    limit = longest if lengths.limit is None else min(longest, lengths.limit)
    multiple = lengths.pad_to if lengths.pad_to is not None and limit <= lengths.pad_to else lengths.multiple
    if limit < longest or multiple is not None:
        made = truncate(made, vocab, limit, pad_to_multiple_of=multiple, **shape)
    strip = ragged or not (lengths.padded or side)
    keep = made["attention_mask"].bool() if strip else None
    out = dict(output)
    for name in dict.fromkeys([*names, "attention_mask"]):
        rows = _as_before(made[name], ids, keep)
        out[name] = rows[0] if flat else rows
    if output.get("length") is not None:
        total = made["attention_mask"].sum(1)
        out["length"] = total if isinstance(output["length"], torch.Tensor) else total.tolist()
    return out


def _as_tensor(values: Any) -> torch.Tensor:
    """``(B, N)`` or ``(B, N, …)``, shorter rows filled with zeros on the right."""
    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, np.ndarray) and values.dtype != object:
        return torch.from_numpy(values)
    rows = [torch.as_tensor(np.asarray(row)) for row in values]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).long()


def _as_before(made: torch.Tensor, ids: Any, keep: torch.Tensor | None) -> Any:
    """``made`` in the container of ``ids``; of lists, only what ``keep`` ``(B, M)`` says."""
    if isinstance(ids, torch.Tensor):
        return made
    if isinstance(ids, np.ndarray):
        return made.numpy()
    return [(row if keep is None else row[keep[number]]).tolist() for number, row in enumerate(made)]
