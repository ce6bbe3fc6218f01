"""KV caches that know what their slots hold, so that what goes on from them keeps the rule.

:class:`KVSlots` says what each slot is and where the sequence goes on. It belongs to the cache object
(:class:`RemembersSlots`) and follows every operation on it: crop, repeat, select, reorder, reset, copy,
pickle.

Shapes: ``B`` rows, ``L`` slots, ``T`` text tokens of a prompt still to come.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .._compat import checkpointed_layers_drop_caches
from .extension import Extension, extend
from .layout import TokenKind
from .masks import TokenTable


@dataclass(frozen=True)
class KVSlots:
    """What the slots of a KV cache hold, and where the sequence goes on. Never changed in place.

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
        open_to_text: every slot may be read by whatever text comes after it, so that the backbone's own mask
            says all there is to say: no vision token among them, no window that asks where a slot stood.
        full: no slot, and no planned token, is padding, as far as the host knows without reading the table.
    """

    table: TokenTable
    next_position: torch.Tensor
    next_order: torch.Tensor
    num_blocks: torch.Tensor
    planned: TokenTable | None = None
    planned_positions: torch.Tensor | None = None
    planned_prefix: torch.Tensor | None = None
    open_to_text: bool = False
    full: bool = False

    @classmethod
    def starting_at(cls, order: torch.Tensor) -> KVSlots:
        """Those of an empty cache whose rows go on from sequence index ``order`` ``(B,)``."""
        none = order.new_zeros((len(order), 0))
        zero = torch.zeros_like(order)
        return cls(TokenTable(none, none, none), zero, order, zero)

    @classmethod
    def of_text(cls, mask: torch.Tensor) -> KVSlots:
        """Those of a cache that holds plain text alone, under its 2-D mask ``(B, L)``."""
        rows, length = mask.shape
        kind = torch.where(mask.bool(), TokenKind.TEXT, TokenKind.PAD)
        order = torch.arange(length, device=mask.device).expand(rows, length)
        table = TokenTable(kind, torch.full_like(kind, -1), order, ordered=True)
        start = torch.full((rows,), length, device=mask.device)
        return cls(table, mask.long().sum(dim=1), start, torch.zeros_like(start))

    @staticmethod
    def of(cache: Any) -> KVSlots | None:
        """What ``cache`` remembers, if anything."""
        return cache.voco_slots if isinstance(cache, RemembersSlots) else None

    def check(self, length: int, rows: int) -> None:
        """Refuse a cache whose tensors are not what is remembered of them.

        Args:
            length, rows: of the cache's tensors now.

        Raises:
            ValueError: it was written or cut by something that goes around the cache's own methods, or holds
                packed rows.
        """
        if self.table.document is not None:
            raise ValueError(
                "this KV cache was written by packed rows (document_ids), and nothing can go on from several "
                "documents at once; start from an empty cache."
            )
        if rows != self.table.num_rows:
            raise ValueError(
                f"a batch of {rows} rows cannot go on from a cache of {self.table.num_rows} rows; repeat or "
                "select its rows (batch_repeat_interleave, batch_select_indices)."
            )
        if length != self.table.length:
            raise ValueError(
                f"the KV cache holds {length} slots, of which {self.table.length} were written under the "
                "rule; change it by its own methods only (crop, …)."
            )

    def rows(self, change: Any) -> KVSlots:
        """Other rows: ``change`` takes a tensor's dim 0, row ``(B, …)``, to those wanted ``(B', …)``."""

        def vector(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else change(value)

        return replace(
            self,
            table=self.table.each(change),
            next_position=change(self.next_position),
            next_order=change(self.next_order),
            num_blocks=change(self.num_blocks),
            planned=None if self.planned is None else self.planned.each(change),
            planned_positions=vector(self.planned_positions),
            planned_prefix=vector(self.planned_prefix),
        )

    def repeated(self, times: int) -> KVSlots:
        """Each row ``times`` times in a row, as beam search does."""
        return self.rows(lambda value: value.repeat_interleave(times, dim=0)) if times != 1 else self

    def selected(self, rows: torch.Tensor) -> KVSlots:
        """The named rows ``(B',)`` (or a mask of rows ``(B,)`` bool), in that order."""
        return self.rows(lambda value: value[rows.to(value.device)])

    def cropped(self, length: int) -> KVSlots:
        """The first ``length`` slots (an assisted decoder takes back what was not accepted).

        Raises:
            ValueError: that would cut into, or away, a vision block.
        """
        if length >= self.table.length:
            return self
        tail = self.table.kind[:, length:]
        if bool(((tail == TokenKind.VISION) | (tail == TokenKind.VOCO)).any()):
            raise ValueError("the KV cache was cropped inside a vision block; compress the image again.")
        dropped = (tail != TokenKind.PAD).sum(dim=1)
        return KVSlots(
            self.table.crop(length),
            self.next_position - dropped,
            self.next_order - tail.shape[1],
            self.num_blocks,
            open_to_text=self.open_to_text,
            full=self.full,
        )

    def go_on(self, mask: torch.Tensor, full: bool = False) -> KVSlots:
        """After new text tokens under ``mask`` ``(B, N)``, right after what is there.

        Args:
            full: whether slots and ``mask`` are known to hold no padding.
        """
        kind = torch.where(mask.bool(), TokenKind.TEXT, TokenKind.PAD)
        steps = torch.arange(mask.shape[1], device=mask.device)
        new = TokenTable(kind, torch.full_like(kind, -1), self.next_order[:, None] + steps)
        return KVSlots(
            self.table.append(new),
            self.next_position + mask.long().sum(dim=1),
            self.next_order + mask.shape[1],
            self.num_blocks,
            open_to_text=self.open_to_text,
            full=full,
        )

    def take_planned(self, tokens: int) -> tuple[torch.Tensor, KVSlots]:
        """Positions ``(B, tokens)`` of the next planned tokens, and what is remembered after them.

        Raises:
            ValueError: more than are planned, or a part of a prompt that is read both ways.
        """
        assert self.planned is not None and self.planned_positions is not None
        ahead = self.planned.length
        if tokens > ahead:
            raise ValueError(f"{tokens} tokens were given where the cached prompt has {ahead} still to come.")
        if tokens < ahead and self.planned_prefix is not None:
            raise ValueError(
                f"{tokens} of a prompt's {ahead} tokens were given, and this model reads its prompt both "
                "ways: give the whole prompt at once (leave prefill_chunk_size out)."
            )
        rest = None
        if tokens < ahead:
            rest = self.planned.each(lambda value: value[:, tokens:])
        return self.planned_positions[:, :tokens], KVSlots(
            self.table.append(self.planned.crop(tokens)),
            self.next_position,
            self.next_order,
            self.num_blocks,
            rest,
            self.planned_positions[:, tokens:] if rest is not None else None,
            open_to_text=self.open_to_text,
            full=self.full,
        )


class RemembersSlots(Extension):
    """A transformers ``Cache`` that knows what its slots hold.

    Attributes:
        voco_slots: what the rule needs to know of them; ``None`` where no rule applied yet.
        voco_made_by: the fingerprint of the model that wrote them, where they are to be gone on from later.
        voco_ids_count: whether the ``input_ids`` that ``generate`` holds stand for these slots too (a static
            cache and an assistant model count on an id for every slot).
        voco_unfinished: while a forward under the rule writes here, the length before it; what that forward
            leaves behind where it is stopped nobody can tell.
    """

    voco_slots: KVSlots | None = None
    voco_made_by: dict[str, Any] | None = None
    voco_ids_count: bool = False
    voco_unfinished: int | None = None

    def check_finished(self, length: int) -> None:
        """Refuse to go on from a cache of ``length`` slots that a forward was stopped in the
        middle of writing.

        Raises:
            ValueError: it was.
        """
        if self.voco_unfinished not in (None, length):
            raise ValueError(
                f"this KV cache holds {length} slots, and the forward that wrote those after the first "
                f"{self.voco_unfinished} was stopped before it ended; start from an empty cache."
            )

    def crop(self, *args: Any, **kwargs: Any) -> None:
        before = self.get_seq_length()  # type: ignore[attr-defined]
        slots = self.voco_slots
        if slots is not None and slots.table.length == before and args and args[0] < 0:
            slots.cropped(before + args[0])  # refused before a tensor is cut
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if slots is not None and slots.table.length == before:
            self.voco_slots = slots.cropped(self.get_seq_length())  # type: ignore[attr-defined]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.voco_slots is not None:
            self.voco_slots = self.voco_slots.repeated(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def _select(self, rows: torch.Tensor) -> None:
        if self.voco_slots is not None:
            self.voco_slots = self.voco_slots.selected(torch.as_tensor(rows))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.voco_slots = self.voco_made_by = self.voco_unfinished = None
        self.voco_ids_count = False

    def __copy__(self) -> Any:
        """Layers of its own around the same tensors: an operation on one leaves the other as it is."""
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        made.layers = [copy.copy(layer) for layer in self.layers]  # type: ignore[attr-defined]
        return made


class VoCoKVCache(RemembersSlots, DynamicCache):
    """A ``DynamicCache`` that knows what its slots hold: what stage 1 and stage 2 make."""


def begin(cache: Cache, length: int) -> None:
    """Let ``cache`` (any of transformers'), of ``length`` slots, know that a forward under the rule writes to
    it.
    """
    if type(cache) is DynamicCache:
        cache.__class__ = VoCoKVCache
    elif not isinstance(cache, RemembersSlots):
        extend(cache, RemembersSlots)
    cache.voco_unfinished = length


def remember(cache: Cache, slots: KVSlots) -> None:
    """Let ``cache`` know what its slots hold, now that the forward has ended."""
    begin(cache, 0)
    cache.voco_slots, cache.voco_unfinished = slots, None


__all__ = ["KVSlots", "RemembersSlots", "VoCoKVCache", "begin", "remember"]


def check_reaches_layers(module: torch.nn.Module, mode: Any) -> None:
    """Refuse a KV cache that gradient checkpointing would keep from the layers of ``module``, the backbone.

    transformers takes the cache away from a layer that it checkpoints; the attention then meets a mask that
    does not fit what it was given, or nothing asks for what is missing. Layers of a training in two stages
    keep theirs (``training/two_stage/layer_checkpointing.py``).

    Args:
        mode: the forward's ``ForwardMode``.

    Raises:
        ValueError: it would.
    """
    if not module.training or not (torch.is_grad_enabled() or checkpointed_layers_drop_caches()):
        return
    kept = mode.stage_one or mode.checkpoint_cached_layers
    text = module.get_decoder() if hasattr(module, "get_decoder") else module
    for layer in text.modules():
        if getattr(layer, "gradient_checkpointing", False) and isinstance(layer, GradientCheckpointingLayer):
            if layer.training and not (kept and getattr(layer, "keeps_its_cache", False)):
                raise ValueError(
                    "gradient checkpointing is on and the model is in training mode: its layers get no KV "
                    "cache, so it can neither generate nor read blocks; call model.eval() first, or "
                    "model.gradient_checkpointing_disable()."
                )
