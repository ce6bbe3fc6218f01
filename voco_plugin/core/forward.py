"""The rule at work inside a model: two hooks around the backbone's forward, below the LM head.

Before the forward, the layout is read from ``input_ids``, positions are computed and the rule is put in
force; after it (also when it raised) the rule is lifted, and the KV cache remembers what its slots hold, so
that decoding goes on under the same rule. A batch without vision or VoCo tokens passes through untouched.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import Cache

from .._compat import cache_of, given_cache
from ..config import VoCoConfig
from .adapter_switch import on_starting_weights
from .attention import ActiveRule, activate, deactivate
from .block_embeddings import QUESTION_MASK, BlockEmbeddings, Places, in_packed_rows
from .kv_cache import CacheState
from .layout import SequenceLayout, TokenKind, TokenVocabulary, compact_positions
from .masks import TokenTable
from .packed_forward import prepare_packed
from .packed_rows import DOCUMENT_IDS, Documents

if TYPE_CHECKING:
    from ..models.families.base import Family


class _Running(NamedTuple):
    """One forward of the backbone, from its first hook to its last. Without a rule all is ``None``."""

    token: Any = None
    active: ActiveRule | None = None
    state: CacheState | None = None
    past: Any = None
    places: Places | None = None


class Attachment:
    """Everything that :func:`~voco_plugin.models.attach` put on a model.

    Attributes:
        config: the :class:`~voco_plugin.config.VoCoConfig` in force.
        vocab: the ids by which sequences are read.
        family: the model's :class:`~voco_plugin.models.families.base.Family`.
        processor: the processor given to ``attach``, or ``None``.
        embeddings: what makes the VoCo tokens' input embeddings; ``None`` where they are the token's row.
    """

    def __init__(self, config: VoCoConfig, vocab: TokenVocabulary, family: Family, processor: Any) -> None:
        self.config, self.vocab, self.family, self.processor = config, vocab, family, processor
        self.embeddings: BlockEmbeddings | None = None
        self.restore: dict[str, Any] = {}
        self.handles: list[Any] = []
        self._local = threading.local()

    def __deepcopy__(self, memo: dict) -> Attachment:
        import copy

        new = Attachment(self.config, self.vocab, self.family, self.processor)
        memo[id(self)] = new
        new.restore = copy.deepcopy(self.restore, memo)
        new.embeddings = copy.deepcopy(self.embeddings, memo)
        new.handles = copy.deepcopy(self.handles, memo)
        return new

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``voco_config.json``: the rule, the ids it is read by, and whether the token's row was made
        here.

        An adapter's checkpoint holds the trained input row only; whoever loads it onto the same base makes
        the other row (the LM head's) anew from the same seed.
        """
        return self.config.save(folder, vocabulary=self.vocab.to_dict(), row_made="rows" in self.restore)

    @contextlib.contextmanager
    def positions(self, policy: str) -> Iterator[None]:
        """How ``position_ids`` given to the backbone are taken inside the block.

        ``check`` (the default): refused where they contradict the rule's. ``own``: ignored, the rule's are
        used. ``trust``: used as they are. ``alone``: as ``trust``, and the rule is not put in force: stage 1
        says so of rows that are one whole block each, which hides nothing from itself.
        """
        before = getattr(self._local, "policy", "check")
        self._local.policy = policy
        try:
            yield
        finally:
            self._local.policy = before

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block, forwards of this thread are those of the model before ``attach``, bit for bit: no
        rule, no positions, no embeddings made for VoCo tokens. A distillation's teacher reads so (Eq. 1).
        """
        before = getattr(self._local, "suspended", False)
        self._local.suspended = True
        try:
            yield
        finally:
            self._local.suspended = before

    # -- hooks
    # ---------------------------------------------------------------------------------------------------

    def install(self, model: torch.nn.Module) -> None:
        """Hook the forward of the model's backbone and, where VoCo tokens have embeddings of their own, of
        its decoder stack.
        """
        backbone = self.family.backbone(model)
        self.handles = [
            backbone.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            backbone.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]
        if self.embeddings is not None:
            module, after = self.family.merged_at(model)
            if after:
                self.handles.append(module.register_forward_hook(self.after_merging))
            else:
                self.handles.append(module.register_forward_pre_hook(self.before_decoder, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _stack(self) -> list:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    @torch.compiler.disable
    def before_forward(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Read the layout, set the positions, put the rule in force."""
        if getattr(self._local, "suspended", False):
            self._stack().append(_Running())
            return None
        named = kwargs
        if args:
            names = list(inspect.signature(module.forward).parameters)
            named = {**dict(zip(names, args, strict=False)), **kwargs}
        # where the whole model is its own backbone (Llama 4), stage 2 calls it again without the cache
        staged = named.get("voco_cache") is not None
        alone = getattr(self._local, "policy", "check") == "alone"
        if self.config.frozen_stage1 and not staged and not on_starting_weights():
            self._refuse_one_pass(named)
        places, given = None, named
        if self.embeddings is not None and not staged:
            named, places = self._find_places(named)
        ruled = self.config.isolates and not staged and not alone
        if named.get(DOCUMENT_IDS) is not None:
            if staged or alone:
                raise ValueError(
                    f"{DOCUMENT_IDS} belong to packed rows in a single pass, not to compression or caches."
                )
            prepared = prepare_packed(self, module, named)
        else:
            prepared = self.prepare(module, named) if ruled else None
        if prepared is None:
            self._stack().append(_Running(places=places))
            return None if named is given else ((), named)
        kwargs, active, state = prepared
        token = None if active is None else activate(active)
        self._stack().append(_Running(token, active, state, given_cache(kwargs), places))
        return (), kwargs

    def _refuse_one_pass(self, kwargs: dict) -> None:
        """Refuse vision tokens in a forward with the adapter on.

        Raises:
            ValueError: there are some.
        """
        ids, past = kwargs.get("input_ids"), given_cache(kwargs)
        decoding = isinstance(past, Cache) and past.get_seq_length() and ids is not None and ids.shape[1] == 1
        if ids is None or decoding:  # one decoded token is no block, whatever its id
            return
        vision = torch.tensor(sorted(self.vocab.placeholders), device=ids.device)
        if bool(torch.isin(ids, vision).any()):
            raise ValueError(
                "this model's stage 1 is frozen (frozen_stage1): it compresses without its adapter and reads "
                "with it, which one pass over image and text cannot do; use generate(**inputs), or compress "
                "and voco_cache=…"
            )

    @torch.compiler.disable
    def after_forward(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Lift the rule; check that a mask was built under it; let the KV cache remember its slots."""
        if not self._stack():
            return  # the pre-hook itself raised
        token, active, state, past, places = self._stack().pop()
        if token is not None:
            deactivate(token)
        if output is None:
            return  # the forward raised
        if places is not None and not places.written:
            raise RuntimeError(
                f"{type(module).__name__} did not hand its merged embeddings to its decoder, so "
                f"compressor={self.config.compressor!r} with token_init={self.config.token_init!r} was not "
                "applied; this family takes token_init='learned' only."
            )
        if state is None:
            return  # no rule applied
        if active is not None and active.masks_built == 0:
            raise RuntimeError(
                f"{type(module).__name__} built no attention mask through transformers' mask interface, so "
                "the isolation rule was not applied; this family is not supported."
            )
        if not isinstance(past, Cache):
            past = cache_of(output)
        if isinstance(past, Cache):
            state.put_on(past)

    @torch.compiler.disable
    def before_decoder(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Write the VoCo tokens' embeddings of the forward that runs, where it holds blocks."""
        merged = kwargs.get("inputs_embeds")
        made = self._written(merged)
        return None if made is merged else (args, {**kwargs, "inputs_embeds": made})

    @torch.compiler.disable
    def after_merging(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """As :meth:`before_decoder`, where a module of its own merges the image features."""
        return self._written(output)

    def _written(self, merged: torch.Tensor | None) -> torch.Tensor | None:
        places = self._stack()[-1].places if self._stack() else None
        if merged is None or places is None or places.written or self.embeddings is None:
            return merged
        return self.embeddings.write(places, merged)

    # -- what the hooks compute
    # ----------------------------------------------------------------------------------

    def prepare(
        self, backbone: torch.nn.Module, kwargs: dict
    ) -> tuple[dict, ActiveRule | None, CacheState] | None:
        """New keyword arguments, the rule and the cache state of one forward; ``None`` where no rule
        applies. The rule is ``None`` where text goes on from slots it may all read.
        """
        past = given_cache(kwargs)
        length = past.get_seq_length() if isinstance(past, Cache) else 0
        state = CacheState.of(past)
        input_ids = kwargs.get("input_ids")
        if input_ids is None:
            if state is None and kwargs.get("inputs_embeds") is None:
                return None
            raise ValueError(
                "input_ids are needed to find the vision and VoCo tokens; inputs_embeds alone do not show "
                "where they are: pass input_ids (and pixel_values), or detach the model."
            )
        rows, tokens = input_ids.shape
        mask = self._mask(kwargs.get("attention_mask"), rows, tokens, length, input_ids)
        if tokens == 1 and length:
            layout = SequenceLayout.of_text(
                mask[:, length:]
            )  # one decoded token is no block, whatever its id
        else:
            layout = SequenceLayout.from_ids(input_ids, mask[:, length:], self.vocab)
        if state is None and not (layout.has_vision or layout.has_voco):
            return None
        if (
            isinstance(kwargs.get("attention_mask"), dict)
            or getattr(kwargs.get("attention_mask"), "ndim", 2) != 2
        ):
            raise ValueError(
                "attention_mask must be the 2-D padding mask: a ready-made mask (a static cache's, or a 4-D "
                "one) replaces the isolation rule; pass the 2-D mask and a dynamic cache."
            )
        device = input_ids.device
        state = self._past_state(state, mask[:, :length], length, rows, device)
        if state.settled and state.planned is None and not (layout.has_vision or layout.has_voco):
            new = mask[:, length:]
            own = self.family.sequential(backbone, input_ids, new, {}).to(device)
            kwargs = dict(kwargs)
            kwargs["attention_mask"] = mask
            positions = own + state.next_position[:, None]
            kwargs["position_ids"] = self.agree(kwargs.get("position_ids"), positions, layout, backbone)
            return kwargs, None, state.go_on(new)
        prefix = state.planned_prefix
        positions, state = self._extend(backbone, layout, mask[:, length:], input_ids, kwargs, state)
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = mask
        kwargs["position_ids"] = self.agree(kwargs.get("position_ids"), positions, layout, backbone)
        return kwargs, ActiveRule(self.config, state.table, state.table.in_slot_order, prefix), state

    def _find_places(self, kwargs: dict) -> tuple[dict, Places | None]:
        """The blocks whose embeddings are made in this forward; and its arguments without the question mask,
        which the backbone does not know.
        """
        assert self.embeddings is not None
        kwargs = dict(kwargs)
        question, ids = kwargs.pop(QUESTION_MASK, None), kwargs.get("input_ids")
        if ids is None or (ids.shape[1] == 1):  # one decoded token is no block
            return kwargs, None
        if kwargs.get(DOCUMENT_IDS) is not None:
            if self.embeddings.compressor.reads_question:
                raise ValueError(
                    f"compressor={self.config.compressor!r} reads the question behind an image, which packed "
                    "rows do not keep apart; train it without packing."
                )
            documents = Documents(kwargs[DOCUMENT_IDS].to(ids.device), ids.shape)
            alone = documents.split(ids, self.vocab.voco_id)
            found = SequenceLayout.from_ids(alone, documents.mask.long(), self.vocab)
            kind = documents.join(found.kind, TokenKind.PAD)
            layout = SequenceLayout(kind, kind, in_packed_rows(found.spans, documents))
        else:
            mask = kwargs.get("attention_mask")
            given = isinstance(mask, torch.Tensor) and mask.ndim == 2
            layout = SequenceLayout.from_ids(ids, mask[:, -ids.shape[1] :] if given else None, self.vocab)
        return kwargs, self.embeddings.places(ids, layout, self.vocab, question)

    def check_reusable(self, what: str) -> None:
        """Refuse to cache what was made for one question.

        Raises:
            ValueError: the compressor reads the question.
        """
        if self.embeddings is not None and self.embeddings.compressor.reads_question:
            raise ValueError(
                f"{what}: compressor={self.config.compressor!r} reads the question before it compresses, so "
                "a cache would answer other questions wrongly; ask with the image in the prompt."
            )

    @staticmethod
    def _mask(given: Any, rows: int, tokens: int, length: int, ids: torch.Tensor) -> torch.Tensor:
        """The 2-D mask over past and new tokens, ``(B, length + N)``; all ones where none was given."""
        if not isinstance(given, torch.Tensor) or given.ndim != 2:
            return torch.ones(rows, length + tokens, dtype=torch.long, device=ids.device)
        if given.shape[1] != length + tokens:
            raise ValueError(
                f"attention_mask has {given.shape[1]} columns; {length} cached + {tokens} new tokens need "
                f"{length + tokens}."
            )
        return given

    @staticmethod
    def _past_state(
        state: CacheState | None, mask: torch.Tensor, length: int, rows: int, device: torch.device
    ) -> CacheState:
        """The state before this forward: remembered, or of a past of plain text."""
        if state is not None:
            return state.synced(length, rows)
        count = mask.long().sum(dim=1).to(device)
        kind = torch.where(mask.bool(), TokenKind.TEXT, TokenKind.PAD).to(device)
        order = torch.arange(length, device=device).expand(rows, length)
        table = TokenTable(kind, torch.full_like(kind, -1), order)
        start = torch.full((rows,), length, device=device)
        return CacheState(table, count, start, torch.zeros_like(count))

    def _extend(self, backbone, layout, mask, input_ids, kwargs, state) -> tuple[torch.Tensor, CacheState]:
        """Positions of the new tokens, and the state after them."""
        device = input_ids.device
        if state.planned is not None:
            return state.take_planned(layout.num_tokens)
        given = kwargs.get("position_ids")
        own = getattr(self._local, "policy", "check") == "own"
        grids = any(k.endswith("grid_thw") and v is not None for k, v in kwargs.items())
        if own and layout.has_vision and not grids and isinstance(given, torch.Tensor) and given.ndim == 3:
            # generate encodes the images itself and keeps their grids; its 3-axis positions count as the
            # backbone does
            sequential = given[-3:].to(device) - state.next_position[:, None]
        else:
            sequential = self.family.sequential(backbone, input_ids, mask, kwargs).to(device)
        if self.config.positions == "compact":
            local = compact_positions(layout, sequential)
        else:
            local = sequential
        positions = local + state.next_position[:, None]
        real = (layout.kind != TokenKind.PAD).to(device)
        stream = layout.in_stream.to(device)
        counted = stream if self.config.positions == "compact" else real
        flat = positions if positions.dim() == 2 else positions.amax(dim=0)
        last = torch.where(counted, flat, torch.full_like(flat, -1)).amax(dim=1)
        next_position = torch.maximum(last + 1, state.next_position)
        block = layout.block.to(device)
        block = torch.where(block >= 0, block + state.num_blocks[:, None], block)
        order = state.next_order[:, None] + torch.arange(layout.num_tokens, device=device)
        table = state.table.to(device).append(TokenTable(layout.kind.to(device), block, order))
        blocks = torch.tensor([len(layout.row_spans(r)) for r in range(layout.num_rows)], device=device)
        return positions, CacheState(
            table, next_position, state.next_order + layout.num_tokens, state.num_blocks + blocks
        )

    def agree(self, given, own, layout, backbone) -> torch.Tensor:
        """The positions to use: the rule's, unless the caller's are trusted; a contradiction raises."""
        policy = getattr(self._local, "policy", "check")
        if policy == "trust" and given is not None:
            return given
        if policy == "check" and given is not None:
            flat, mine = given.to(own.device), own
            if flat.dim() == 3 and mine.dim() == 3:
                flat = flat[-mine.shape[0] :]  # some families put 1-D text positions in front
            elif flat.dim() != mine.dim():
                flat, mine = (flat[-1] if flat.dim() == 3 else flat), (mine[0] if mine.dim() == 3 else mine)
            real = (layout.kind != TokenKind.PAD).to(own.device)
            if flat.shape[-1] != mine.shape[-1] or bool(((flat != mine) & real).any()):
                raise ValueError(
                    f"position_ids given do not agree with positions={self.config.positions!r} of the VoCo "
                    "config; leave position_ids out."
                )
        return self.family.shape_positions(backbone, own)
