"""Conversations packed into rows."""

from __future__ import annotations

import torch

import voco_plugin as vp
from harness import ROWS, inputs
from tiny import PAD
from voco_plugin.core.layout import TokenKind
from voco_plugin.core.packed_rows import pack_batch

COUNTS = [3, 1, 2]


LONG = [*ROWS, ["bos", "t9"], ["t1", "img", "c2"]]
"""Six conversations in three rows: text alone too, beside others and as a row's last."""


def packed_inputs(model, name, rows, counts=COUNTS, **options):
    """``(one batch row a conversation, the same packed)``."""
    batch = inputs(name, rows, **options)
    by_row = vp.attachment(model).family.images_by_row
    return batch, pack_batch(batch, counts, pad_token_id=PAD, images_by_row=by_row)


def numbered(table, cuts):
    """``table`` with its rows cut into documents before the text tokens that ``cuts`` draws."""
    real = table.kind != TokenKind.PAD
    free = (table.kind == TokenKind.TEXT) & (torch.rand(table.kind.shape, generator=cuts) < 0.2)
    table.document = torch.where(real, 1 + free.long().cumsum(1), 0)
    return table
