"""The rule on packed rows: each document is laid out, numbered and isolated as if it stood alone.

A packed row is taken apart into its documents, one row each, and what is found of them is put back where they
stand. So mrope positions, which are counted image by image with the grids, need nothing of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from .._compat import given_cache
from .attention import ActiveRule
from .kv_cache import CacheState
from .layout import SequenceLayout, compact_positions
from .masks import TokenTable
from .packed_rows import DOCUMENT_IDS, Documents

if TYPE_CHECKING:
    from .forward import Attachment


def prepare_packed(
    attachment: Attachment, backbone: torch.nn.Module, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], ActiveRule, CacheState]:
    """New keyword arguments (without ``document_ids``), the rule and the cache state of a packed forward.

    Documents are kept apart under every rule, ``causal`` included, and where there is no image at all.

    Raises:
        ValueError: a KV cache or chunked attention beside packed rows, ``input_ids`` left out, or
            ``document_ids`` that do not number the documents of ``attention_mask``.
    """
    kwargs = dict(kwargs)
    ids, input_ids = kwargs.pop(DOCUMENT_IDS), kwargs.get("input_ids")
    past = given_cache(kwargs)
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
    layout = (
        SequenceLayout.from_ids(alone, own_mask, vocab)
        if config.isolates
        else SequenceLayout.of_text(own_mask)
    )
    more = {
        name: documents.split(value, 0)
        if name.endswith("token_type_ids") and isinstance(value, torch.Tensor)
        else value
        for name, value in kwargs.items()
    }
    positions = family.sequential(backbone, alone, own_mask, more).to(input_ids.device)
    if config.positions == "compact":
        positions = compact_positions(layout, positions)
    whole = _side_by_side(layout, documents)
    rows, tokens = input_ids.shape
    order = torch.arange(tokens, device=input_ids.device).expand(rows, tokens)
    kind, block = (value.to(input_ids.device) for value in (whole.kind, whole.block))
    table = TokenTable(kind, block, order, documents.ids)
    kwargs["attention_mask"] = documents.real.long()
    own = documents.join(positions, 0)
    kwargs["position_ids"] = attachment.agree(kwargs.get("position_ids"), own, whole, backbone)
    none = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
    return kwargs, ActiveRule(config, table), CacheState(table, none, none + tokens, none)


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


def _side_by_side(layout: SequenceLayout, documents: Documents) -> SequenceLayout:
    """The layout of the packed rows, blocks numbered through each row."""
    block = layout.block.clone()
    done: dict[int, int] = {}
    for document, row in enumerate(documents.row.tolist()):
        before = done.get(row, 0)
        inside = block[document] >= 0
        block[document][inside] += before
        done[row] = before + (int(layout.block[document].max()) + 1 if bool(inside.any()) else 0)
    return SequenceLayout(documents.join(layout.kind, 0), documents.join(block, -1))
