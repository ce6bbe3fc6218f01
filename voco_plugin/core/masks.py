"""The isolation rule, stated once, as a predicate over (query, key).

    rule = isolated, block_context = self, two images of 2 vision tokens, K = 1 (rows are queries):

                 t v v C t v v C t
               t x                     text before a block
               v   x                   a block sees only itself: block_context="prefix" shows it the t before
               v   x x
               C   x x x
               t x     x x             text reads C, never v
               v           x
               v           x x
               C           x x x
               t x     x x     x x

A rival of VoCo (``compressor=``) reads the image outside the LLM: its tokens do not see the vision tokens,
and these, which nobody reads, see only themselves.

Every mask, block mask, segment plan and picture of this package derives from :func:`isolation_predicate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config import VOCO, VoCoConfig
from .layout import SequenceLayout, TokenKind, sent

Predicate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_NEVER = torch.iinfo(torch.int64).max


@dataclass
class TokenTable:
    """What the rule needs to know of each key slot, in the order in which the KV cache holds them.

    Attributes:
        kind: ``(B, L)`` int64, :class:`~voco_plugin.core.layout.TokenKind`.
        block: ``(B, L)`` int64, block of a vision or VoCo token within its row, else -1.
        order: ``(B, L)`` int64, index of the slot's token in the whole sequence, vision tokens included. A
            cached block's slots come first in the cache but keep the order they would have had; causality and
            the backbone's windows are read from it.
        document: ``(B, L)`` int64, the slot's document where rows are packed (0 for padding), else ``None``.
        ordered: whether ``order`` is known to be the slot's own index, so that the backbone's own mask needs
            no mapping. Told by whoever makes the table: to ask the tensors would read them back from the
            device.
    """

    kind: torch.Tensor
    block: torch.Tensor
    order: torch.Tensor
    document: torch.Tensor | None = None
    ordered: bool = False

    @classmethod
    def from_layout(cls, layout: SequenceLayout, device: torch.device | str = "cpu") -> TokenTable:
        """The table of a plain forward: slot = token."""
        rows, tokens = layout.kind.shape
        order = torch.arange(tokens, device=device).expand(rows, tokens)
        return cls(sent(layout.kind, device), sent(layout.block, device), order, ordered=True)

    @property
    def length(self) -> int:
        return self.kind.shape[1]

    @property
    def num_rows(self) -> int:
        return self.kind.shape[0]

    def append(self, other: TokenTable, ordered: bool = False) -> TokenTable:
        """This table followed by ``other`` (same rows, same device).

        Args:
            ordered: whether what comes of it is :attr:`ordered`.
        """
        joined = [torch.cat([getattr(self, n), getattr(other, n)], dim=1) for n in _FIELDS]
        if self.document is None and other.document is None:
            return TokenTable(*joined, ordered=ordered)
        own, more = (torch.zeros_like(t.kind) if t.document is None else t.document for t in (self, other))
        return TokenTable(*joined, torch.cat([own, more], dim=1), ordered)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenTable:
        """``change`` applied to every tensor: other rows, other slots, another device."""
        document = None if self.document is None else change(self.document)
        return TokenTable(*(change(getattr(self, n)) for n in _FIELDS), document, self.ordered)

    def crop(self, length: int) -> TokenTable:
        """The first ``length`` slots."""
        return self.each(lambda value: value[:, :length])

    def to(self, device: torch.device | str) -> TokenTable:
        return self.each(lambda value: sent(value, device))

    def pad_to(self, length: int) -> TokenTable:
        """Padding slots up to ``length`` (a static cache shows the mask more slots than are filled)."""
        missing = length - self.length
        if missing <= 0:
            return self
        shape = (self.num_rows, missing)
        # an unfilled slot keeps its own index as order: the causal mask hides it as it does without this
        # table
        order = torch.arange(self.length, length, device=self.order.device).expand(shape)
        last = self.order[:, -1:] if self.length else torch.full_like(order[:, :1], -1)
        order = torch.maximum(order, last + 1 + order - self.length)
        unfilled = torch.full(shape, TokenKind.PAD, device=self.kind.device, dtype=torch.int64)
        none = torch.full(shape, -1, device=self.kind.device, dtype=torch.int64)
        return self.append(TokenTable(unfilled, none, order), ordered=self.ordered)


_FIELDS = ("kind", "block", "order")


@dataclass
class ActiveRule:
    """The rule and the table of every key slot of one forward, past ones included.

    Attributes:
        prefix: ``(B, L)`` bool, slots that see each other both ways (a prefix-LM's prompt in stage 2, where
            the backbone itself no longer says so), or ``None``.
        masks_built: how many masks were made under it; none means that the backbone went around it.
    """

    config: VoCoConfig
    table: TokenTable
    prefix: torch.Tensor | None = None
    masks_built: int = 0


def isolation_predicate(config: VoCoConfig, table: TokenTable) -> Predicate:
    """The rule as ``predicate(batch, head, query, key) -> bool``, indices into the slots of ``table``.

    It says only what the rule hides: causality, padding and windows are the backbone's own mask, and a key is
    visible where both say so. Of packed rows it also hides the other documents, under every rule. Indices
    broadcast, or are scalars under ``vmap``.
    """
    kind, block, order, document = table.kind, table.block, table.order, table.document
    rival = config.compressor != VOCO
    start_of = _first_voco(table) if config.hide_prefix else None

    def predicate(b, h, q, k):
        visible = within(b, q, k)
        return visible if document is None else visible & (document[b, q] == document[b, k])

    def within(b, q, k):
        if config.rule == "causal":
            return torch.ones_like(kind[b, q] + kind[b, k], dtype=torch.bool)
        query_block, key_block = block[b, q], block[b, k]
        key_is_vision = kind[b, k] == TokenKind.VISION
        query_is_text = query_block < 0
        same_block = query_block == key_block
        text_sees = ~key_is_vision
        if start_of is not None:
            start = start_of[b, q]
            text_sees = text_sees & ((order[b, q] <= start) | (order[b, k] >= start))
        block_sees = same_block
        if config.block_context == "prefix":
            block_sees = block_sees | ~key_is_vision
        query_is_vision = kind[b, q] == TokenKind.VISION
        if config.rule == "star" or rival:
            block_sees = block_sees & (~query_is_vision | (order[b, q] == order[b, k]))
        if rival:  # the image is in their input embeddings
            block_sees = block_sees & (query_is_vision | ~key_is_vision)
        return torch.where(query_is_text, text_sees, block_sees)

    return predicate


def _first_voco(table: TokenTable) -> torch.Tensor:
    """``(B, L)``: the order of the first VoCo token of each slot's document (of its row, where none are
    packed).
    """
    document = torch.zeros_like(table.kind) if table.document is None else table.document
    order = torch.where(table.kind == TokenKind.VOCO, table.order, _NEVER)
    count = 1 if table.document is None or not document.numel() else int(document.max()) + 1
    first = order.new_full((table.num_rows, count), _NEVER).scatter_reduce(1, document, order, "amin")
    return first.gather(1, document)


def dense_mask(
    config: VoCoConfig, layout: SequenceLayout, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The whole mask of a plain causal backbone: ``(B, N, N)`` bool, true where the row's query sees the key.

    For pictures and tests; a forward composes the predicate with the backbone's own mask instead.
    """
    table = TokenTable.from_layout(layout)
    rows, tokens = layout.kind.shape
    b = torch.arange(rows)[:, None, None]
    q = torch.arange(tokens)[None, :, None]
    k = torch.arange(tokens)[None, None, :]
    visible = (k <= q) & isolation_predicate(config, table)(b, 0, q, k)
    real = layout.kind != TokenKind.PAD if attention_mask is None else attention_mask.bool()
    return visible & real[:, None, :]


def draw_mask(config: VoCoConfig, layout: SequenceLayout, row: int = 0) -> str:
    """The mask of one row as text: a letter per token (t, v, C, . for padding), ``x`` where the query sees
    the key.
    """
    mask = dense_mask(config, layout)[row]
    letters = [".tvC"[int(kind)] for kind in layout.kind[row]]
    lines = ["  " + " ".join(letters)]
    for letter, visible in zip(letters, mask.tolist(), strict=True):
        lines.append(" ".join([letter, *("x" if seen else " " for seen in visible)]).rstrip())
    return "\n".join(lines)
