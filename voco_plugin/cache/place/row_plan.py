"""Where stage 2 puts everything: pure arithmetic on positions and indices, no model.

One row, K = 2, ``positions="compact"``, an image of 9 vision tokens (``C`` stands in the prompt for a block):

    stream      s  a  C  C  b  c
    position    0  1  2  3  4  5        sequential: C at 11, 12
    order       0  1 11 12 13 14        indices in the whole sequence, vision tokens counted
    slot        2  3  0  1  4  5        the KV cache holds the blocks first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core.layout import TokenKind
from ..cache import VoCoBlock


@dataclass
class RowPlan:
    """One row of the stream: ``T`` text tokens, ``n`` blocks.

    Attributes:
        columns, positions, orders: ``(T,)`` int64, of each text token: its column in the stream, its
            position, its index in the whole sequence.
        block_positions, block_orders: ``(n,)`` int64, of each block's first VoCo token.
        end: position after the row's last token.
    """

    columns: np.ndarray
    positions: np.ndarray
    orders: np.ndarray
    block_positions: np.ndarray
    block_orders: np.ndarray
    end: int


def plan_row(
    row: int,
    kinds: np.ndarray,
    blocks: Sequence[VoCoBlock],
    compact: bool,
    position: int = 0,
    order: int = 0,
) -> RowPlan:
    """The places of one row's tokens.

    Args:
        row: its number, for messages.
        kinds: ``(S,)``, :class:`~voco_plugin.core.layout.TokenKind` of the stream's tokens (padding
        anywhere). compact: whether vision tokens take no position.
        position, order: of the row's first token; more than 0 where a KV cache stands before it.

    Raises:
        ValueError: VoCo tokens and blocks do not match; the message names sample and position.
    """
    real = kinds != TokenKind.PAD
    is_voco = kinds == TokenKind.VOCO
    starts = _block_starts(row, is_voco, blocks)
    # every token advances both counts by one; a block's first VoCo token also by what its vision tokens take
    extra_position, extra_order = np.zeros_like(kinds), np.zeros_like(kinds)
    if len(blocks):
        extra_order[starts] = [b.num_vision for b in blocks]
        if not compact:
            extra_position[starts] = [b.extent for b in blocks]
    count = np.cumsum(real) - 1
    positions = position + count + np.cumsum(extra_position)
    orders = order + count + np.cumsum(extra_order)
    columns = np.flatnonzero(kinds == TokenKind.TEXT)
    end = int(positions[real][-1]) + 1 if real.any() else position
    return RowPlan(columns, positions[columns], orders[columns], positions[starts], orders[starts], end)


def _block_starts(row: int, is_voco: np.ndarray, blocks: Sequence[VoCoBlock]) -> np.ndarray:
    """The column of each block's first VoCo token ``(n,)``."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], is_voco.astype(np.int8), [0]))))
    starts: list[int] = []
    for start, stop in edges.reshape(-1, 2).tolist():
        while start < stop:
            if len(starts) == len(blocks):
                raise ValueError(
                    f"sample {row}, position {start}: a VoCo token with no block for it; the cache holds "
                    f"{len(blocks)} block(s) for this row."
                )
            wanted = blocks[len(starts)].num_tokens
            if stop - start < wanted:
                raise ValueError(
                    f"sample {row}, position {start}: {stop - start} VoCo token(s) for block {len(starts)}, "
                    f"which holds {wanted}; use {wanted} in the prompt, or cache.first({stop - start})."
                )
            starts.append(start)
            start += wanted
    if len(starts) < len(blocks):
        raise ValueError(
            f"sample {row}: the cache holds {len(blocks)} block(s) and the prompt VoCo tokens for "
            f"{len(starts)}; put each block's VoCo tokens into the prompt, or take a part of the cache "
            "(cache[:n])."
        )
    return np.asarray(starts, dtype=np.int64)
