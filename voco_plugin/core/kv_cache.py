"""What the slots of a KV cache hold, remembered on the cache itself, so that decoding keeps the rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from .layout import TokenKind
from .masks import TokenTable

_STATE = "_voco_state"


@dataclass
class CacheState:
    """What the slots of a KV cache hold, and where the sequence goes on.

    Attributes:
        table: kind, block and sequence index of every slot, ``(B, L)``.
        next_position: ``(B,)`` int64, position of the next stream token.
        next_order: ``(B,)`` int64, sequence index of the next token (vision tokens counted).
        num_blocks: ``(B,)`` int64, blocks so far.
        planned: stage 2 only: the prompt's text tokens still to come, ``(B, T)``; images stand between them,
            so their numbers have gaps.
        planned_positions: ``(B, T)`` int64, their positions.
        planned_prefix: ``(B, L + T)`` bool, slots and planned tokens that see each other both ways in a
            prefix-LM, else ``None``.
        settled: every slot may be read by whatever text comes after it, so that the backbone's own mask says
            all there is to say: no vision token among them, no window that asks where a slot stood.
    """

    table: TokenTable
    next_position: torch.Tensor
    next_order: torch.Tensor
    num_blocks: torch.Tensor
    planned: TokenTable | None = None
    planned_positions: torch.Tensor | None = None
    planned_prefix: torch.Tensor | None = None
    settled: bool = False

    @classmethod
    def starting_at(cls, order: torch.Tensor) -> CacheState:
        """The state of an empty cache whose rows go on from sequence index ``order`` ``(B,)``."""
        none = order.new_zeros((len(order), 0))
        zero = torch.zeros_like(order)
        return cls(TokenTable(none, none, none), zero, order, zero)

    def put_on(self, cache: Cache) -> None:
        """Remember this state on ``cache``."""
        setattr(cache, _STATE, self)

    @staticmethod
    def of(cache: Any) -> CacheState | None:
        """The state remembered on ``cache``, if any."""
        return getattr(cache, _STATE, None)

    def synced(self, length: int, rows: int) -> CacheState:
        """This state cut to ``length`` slots (an assisted decoder crops) and repeated to ``rows`` (beams)."""
        state = self
        if state.table.document is not None:
            raise ValueError(
                "this KV cache was written by packed rows (document_ids), and nothing can go on from several "
                "documents at once; start from an empty cache."
            )
        if rows != state.table.num_rows:
            if rows % state.table.num_rows:
                raise ValueError(
                    f"a batch of {rows} rows cannot go on from a cache of {state.table.num_rows} rows."
                )
            state = state._repeated(rows // state.table.num_rows)
        cut = state.table.length - length
        if cut > 0:
            tail = state.table.kind[:, length:]
            if bool(((tail == TokenKind.VISION) | (tail == TokenKind.VOCO)).any()):
                raise ValueError("the KV cache was cropped inside a vision block; compress the image again.")
            dropped = (tail != TokenKind.PAD).sum(dim=1)
            state = CacheState(
                state.table.crop(length),
                state.next_position - dropped,
                state.next_order - dropped,
                state.num_blocks,
                settled=state.settled,
            )
        elif cut < 0:
            raise ValueError(
                f"the KV cache holds {length} slots, of which only {state.table.length} were written under "
                "the rule."
            )
        return state

    def _repeated(self, times: int) -> CacheState:
        vectors = (self.next_position, self.next_order, self.num_blocks)
        planned = self.planned_positions
        return CacheState(
            self.table.repeat_rows(times),
            *(v.repeat_interleave(times) for v in vectors),
            self.planned.repeat_rows(times) if self.planned is not None else None,
            planned.repeat_interleave(times, dim=0) if planned is not None else None,
            None if self.planned_prefix is None else self.planned_prefix.repeat_interleave(times, dim=0),
            self.settled,
        )

    def go_on(self, mask: torch.Tensor) -> CacheState:
        """The state after new text tokens under ``mask`` ``(B, N)``, right after what is there."""
        kind = torch.where(mask.bool(), TokenKind.TEXT, TokenKind.PAD)
        steps = torch.arange(mask.shape[1], device=mask.device)
        new = TokenTable(kind, torch.full_like(kind, -1), self.next_order[:, None] + steps)
        return CacheState(
            self.table.append(new),
            self.next_position + mask.long().sum(dim=1),
            self.next_order + mask.shape[1],
            self.num_blocks,
            settled=self.settled,
        )

    def take_planned(self, tokens: int) -> tuple[torch.Tensor, CacheState]:
        """Positions ``(B, tokens)`` of the next planned tokens, and the state after them."""
        assert self.planned is not None and self.planned_positions is not None
        ahead = self.planned.length
        if tokens > ahead:
            raise ValueError(f"{tokens} tokens were given where the cached prompt has {ahead} still to come.")
        if tokens < ahead and self.planned_prefix is not None:
            raise ValueError(
                f"{tokens} of a prompt's {ahead} tokens were given, and this model reads its prompt both "
                "ways: "
                "give the whole prompt at once (leave prefill_chunk_size out)."
            )
        rest = None
        if tokens < ahead:
            rest = TokenTable(*(getattr(self.planned, n)[:, tokens:] for n in ("kind", "block", "order")))
        return self.planned_positions[:, :tokens], CacheState(
            self.table.append(self.planned.crop(tokens)),
            self.next_position,
            self.next_order,
            self.num_blocks,
            rest,
            self.planned_positions[:, tokens:] if rest is not None else None,
            settled=self.settled,
        )
