"""One forward under the rule: prepare, run, remember.

    prepare    read the layout from ``input_ids`` (once, on the CPU), compute positions, make the rule and,
    where
               VoCo tokens have embeddings of their own, say where they go
    run        the backbone's own forward, below the LM head: whoever calls it (a fused loss, PEFT, generate)
               gets the same mask
    remember   lift the rule, whatever was raised; check that a mask was built under it; let the KV cache know
               what its slots hold

What a forward needs lives in the locals of :func:`run_forward`, and in one context variable for as long as
that function runs: a forward started inside another sets its own and gives the outer one's back. A batch
without vision or VoCo tokens passes through untouched.

Shapes: ``B`` rows, ``N`` new tokens, ``L`` cached slots.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from .._compat import cache_names
from .adapter_stages import BOTH, BlockTokens, act_by_stage, reset_block_tokens, set_block_tokens
from .attachment import Attachment
from .block_embeddings import QUESTION_MASK, Places
from .extension import Extension
from .kv_cache import KVSlots, RemembersSlots, begin, check_reaches_layers, remember
from .layout import SequenceLayout, TokenKind, compact_positions, sent
from .masks import ActiveRule, TokenTable
from .packed_rows import DOCUMENT_IDS, prepare_packed

_CACHE_NAMES = cache_names()


def as_cache(past: Any) -> dict[str, Any]:
    """``past`` as the keyword argument of a forward or of ``generate``."""
    return {_CACHE_NAMES[0]: past}


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among a caller's keyword arguments, under whichever name, or ``None``."""
    return next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The KV cache that a forward or ``generate`` gave back in ``output``, or ``None``."""
    return getattr(output, _CACHE_NAMES[0], None)


@dataclass(frozen=True)
class ForwardMode:
    """How one forward is run; the argument ``voco_mode`` of an attached model and of its backbone.

    Attributes:
        positions: how ``position_ids`` given are taken. ``check``: refused where they contradict the rule's.
            ``own``: ignored, the rule's are used. ``given``: used as they are.
        rule: whether the rule is put in force. Rows that are one whole block each hide nothing from
        themselves. untouched: the forward is that of the model before ``attach``, bit for bit: no rule, no
        positions, no
            embeddings made for VoCo tokens. A distillation's teacher reads so (Eq. 1).
        stage_one: whether blocks are compressed, each alone; what is read then goes on from no KV cache.
        without_adapter: whether the model's adapters are left out (``frozen_stage1``).
        cut: how the text model is cut to the rows that stage 1 keeps (``cache/compress/last_rows.py``).
        checkpoint_cached_layers: whether decoder layers that are given a KV cache are checkpointed where the
            model has gradient checkpointing on (``training/two_stage/layer_checkpointing.py``).
        output: what the backbone's output is turned into on its way to the head; ``None``: it stays as it is.
    """

    positions: str = "check"
    rule: bool = True
    untouched: bool = False
    stage_one: bool = False
    without_adapter: bool = False
    cut: Any = None
    checkpoint_cached_layers: bool = False
    output: Callable[[Any], Any] | None = None


ONE_PASS = ForwardMode()
OWN_POSITIONS = ForwardMode("own")
UNTOUCHED = ForwardMode(rule=False, untouched=True)
STAGE_ONE = ForwardMode("given", stage_one=True)


@dataclass
class Running:
    """The forward that runs in this thread (the innermost one).

    Attributes:
        rule: the rule in force, or ``None``.
        places: the blocks whose embeddings are to be made, or ``None``.
        tokens: which tokens belong to blocks, where adapters act by stage, or ``None``.
    """

    attachment: Attachment | None = None
    mode: ForwardMode = ONE_PASS
    rule: ActiveRule | None = None
    places: Places | None = None
    tokens: BlockTokens | None = None


_RUNNING: ContextVar[Running | None] = ContextVar("voco_running", default=None)
_HANDED: ContextVar[tuple[torch.nn.Module, ForwardMode] | None] = ContextVar("voco_handed", default=None)


def running_forward() -> Running | None:
    """The attached model's forward that runs in this thread; ``None`` outside of one."""
    return _RUNNING.get()


def active_rule() -> ActiveRule | None:
    """The rule in force, or ``None`` outside a forward that holds VoCo blocks. Mask functions read it."""
    running = _RUNNING.get()
    return None if running is None else running.rule


@contextlib.contextmanager
def in_force(rule: ActiveRule | None) -> Iterator[None]:
    """Inside the block ``rule`` is in force: for whoever calls a mask function without a model."""
    token = _RUNNING.set(Running(rule=rule))
    try:
        yield
    finally:
        _RUNNING.reset(token)


@contextlib.contextmanager
def handing(backbone: torch.nn.Module, mode: ForwardMode) -> Iterator[None]:
    """Inside the block, the next forward of ``backbone`` runs in ``mode``: how an outer forward says so
    through upstream code that passes no argument of ours on. It is taken by that one forward, not by those
    inside it.
    """
    token = _HANDED.set((backbone, mode))
    try:
        yield
    finally:
        _HANDED.reset(token)


class UnderRule(Extension):
    """What an attached model's backbone is extended by.

    ``__call__`` and not ``forward``: where another library has put a ``forward`` on the instance
    (accelerate's ``device_map``), only the call still goes through the class.
    """

    _voco_of: Attachment

    def __call__(self, *args: Any, voco_mode: ForwardMode | None = None, **kwargs: Any) -> Any:
        return run_forward(self._voco_of, self, super().__call__, args, kwargs, voco_mode)  # type: ignore


class TakesBlockEmbeddings(Extension):
    """What the module that gets the merged embeddings is extended by, where VoCo tokens have embeddings that
    are made of their image. ``_voco_after``: the module merges them itself, so that its output is written to.
    """

    _voco_of: Attachment
    _voco_after: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__  # type: ignore[misc]
        running = _RUNNING.get()
        if running is None or running.attachment is not self._voco_of:
            return call(*args, **kwargs)
        if self._voco_after:
            return _with_block_embeddings(running, call(*args, **kwargs))
        merged = kwargs.get("inputs_embeds")
        if merged is not None:
            kwargs["inputs_embeds"] = _with_block_embeddings(running, merged)
        return call(*args, **kwargs)


@torch.compiler.disable
def _with_block_embeddings(running: Running, merged: torch.Tensor) -> torch.Tensor:
    """``(B, N, d)`` with the VoCo tokens' embeddings written, once a forward."""
    assert running.attachment is not None
    embeddings, places = running.attachment.embeddings, running.places
    if places is None or places.written or embeddings is None:
        return merged
    return embeddings.write(places, merged)


def run_forward(
    attachment: Attachment,
    module: torch.nn.Module,
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    mode: ForwardMode | None = None,
) -> Any:
    """``call(*args, **kwargs)``, the forward of the backbone ``module``, under the rule of ``attachment``.

    Args:
        mode: ``None`` takes what an outer forward handed on, else :data:`ONE_PASS`.
    """
    handed = _HANDED.get()
    if mode is None:
        mode = handed[1] if handed is not None and handed[0] is module else ONE_PASS
    untaken = _HANDED.set(None)
    try:
        prepared = _prepare(attachment, module, args, kwargs, mode)
        before, tokens = _RUNNING.set(prepared.running), set_block_tokens(prepared.running.tokens)
        try:
            output = call(*prepared.args, **prepared.kwargs)
        finally:
            reset_block_tokens(tokens)
            _RUNNING.reset(before)
    finally:
        _HANDED.reset(untaken)
    _finish(prepared, module, output)
    return output if mode.output is None else mode.output(output)


# -- prepare


@dataclass
class _Prepared:
    """What a forward is run with. ``slots``: what its KV cache then holds, asked for if there is one."""

    running: Running
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    slots: Callable[[], KVSlots] | None = None


@torch.compiler.disable
def _prepare(
    attachment: Attachment, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], mode: ForwardMode
) -> _Prepared:
    """Read the layout, set the positions, make the rule."""
    running = Running(attachment, mode)
    untouched = _Prepared(running, args, kwargs)
    named = kwargs
    if args:
        names = list(inspect.signature(module.forward).parameters)
        named = {**dict(zip(names, args, strict=False)), **kwargs}
    if mode.untouched:
        _stages(running, module, named)
        return untouched
    packed = named.get(DOCUMENT_IDS) is not None
    if packed and mode.stage_one:
        raise ValueError(f"{DOCUMENT_IDS} belong to packed rows in a single pass, not to compression.")
    config, embeddings = attachment.config, attachment.embeddings
    question = None
    if embeddings is not None and QUESTION_MASK in named:  # which the backbone does not know
        named = dict(named)
        question = named.pop(QUESTION_MASK)
    if packed:
        return _prepare_packed(running, module, named)
    past = given_cache(named)
    if not isinstance(past, Cache):
        past = None
    if past is not None:
        check_reaches_layers(module, mode)
    length = 0 if past is None else past.get_seq_length()
    slots = None if past is None else KVSlots.of(past)
    if isinstance(past, RemembersSlots):
        past.check_finished(length)
    ids = named.get("input_ids")
    ruled = mode.rule and config.rule != "causal"
    frozen = config.frozen_stage1 and not mode.stage_one
    by_stage = config.adapter_stages != BOTH
    layout = None
    if ids is not None and (ruled or frozen or embeddings is not None or by_stage):
        mask = _mask(named.get("attention_mask"), ids, length, slots)
        # one decoded token is no block, whatever its id, and a prompt that stage 2 placed was read there
        if not (ids.shape[1] == 1 and length) and (slots is None or slots.planned is None):
            layout = SequenceLayout.from_ids(ids, mask[:, length:], attachment.vocab)
    if frozen and layout is not None and layout.has_vision:
        raise ValueError(
            "this model's stage 1 is frozen (frozen_stage1): it compresses without its adapter and reads "
            "with "
            "it, which one pass over image and text cannot do; use generate(**inputs), or compress and "
            "voco_cache=…"
        )
    if by_stage:
        _stages(running, module, named, layout, decoded=ids is not None and layout is None)
    if embeddings is not None and layout is not None:
        running.places = embeddings.places(layout, attachment.vocab, question, named)
    if not ruled:
        return untouched if named is kwargs else _Prepared(running, (), named)
    if ids is None:
        if slots is None and named.get("inputs_embeds") is None:
            return untouched
        raise ValueError(
            "input_ids are needed to find the vision and VoCo tokens; inputs_embeds alone do not show where "
            "they are: pass input_ids (and pixel_values), or detach the model."
        )
    blocks = layout is not None and (layout.has_vision or layout.has_voco)
    if slots is None and not blocks:
        return untouched if named is kwargs else _Prepared(running, (), named)
    given = named.get("attention_mask")
    if given is not None and (not isinstance(given, torch.Tensor) or given.ndim != 2):
        raise ValueError(
            "attention_mask must be the 2-D padding mask: a ready-made mask (a static cache's, or a 4-D one) "
            "replaces the isolation rule; pass the 2-D mask and a dynamic cache."
        )
    if slots is not None:
        slots.check(length, len(ids))
    elif length:
        slots = KVSlots.of_text(mask[:, :length].to(ids.device))
    if past is not None and not mode.stage_one:
        begin(past, length)
    return _under_rule(running, module, named, layout, mask, slots, blocks)


def _stages(
    running: Running,
    module: torch.nn.Module,
    named: dict[str, Any],
    layout: SequenceLayout | None = None,
    decoded: bool = False,
) -> None:
    """Where adapters act by stage, say which of the new tokens belong to blocks.

    Args:
        decoded: whether the new tokens are text, known without a layout.

    Raises:
        ValueError: there are images to compress, and no adapter that does it.
    """
    attachment, mode = running.attachment, running.mode
    assert attachment is not None
    config, ids = attachment.config, named.get("input_ids")
    if config.adapter_stages == BOTH:
        return
    if decoded:
        assert ids is not None
        running.tokens = BlockTokens(config.adapter_stages, False, ids.shape)
        if ids.shape[1] > 1:
            act_by_stage(module, config.adapter_stages, attachment.vocab.voco_id)
        return
    if mode.stage_one and config.block_context == "self":
        running.tokens = BlockTokens(config.adapter_stages, True)
    elif layout is not None:
        running.tokens = BlockTokens(config.adapter_stages, layout.block >= 0)
    elif ids is not None:  # the plain model's forward, whose images may have no VoCo tokens
        mask = named.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else None
        found = SequenceLayout.from_ids(ids, mask, attachment.vocab, require_voco=False)
        inside = (found.kind == TokenKind.VISION) | (found.kind == TokenKind.VOCO)
        running.tokens = BlockTokens(config.adapter_stages, inside)
    there = act_by_stage(module, config.adapter_stages, attachment.vocab.voco_id)
    blocks = running.tokens is not None and running.tokens.inside is not False
    if blocks and not there and not mode.untouched:
        raise ValueError(
            f"adapter_stages={config.adapter_stages!r}: an adapter compresses images, and this model has "
            "none (it reads blocks and text as its base does); load the adapter's checkpoint with "
            "voco_plugin.load, or train one with use_peft."
        )


def _under_rule(
    running: Running,
    module: torch.nn.Module,
    kwargs: dict[str, Any],
    layout: SequenceLayout | None,
    mask: torch.Tensor,
    slots: KVSlots | None,
    blocks: bool,
) -> _Prepared:
    """New keyword arguments and the rule of a forward that holds blocks, or goes on from some.

    Args:
        layout: of the new tokens; ``None`` where they are one decoded token.
        mask: ``(B, L + N)``.
        slots: what the KV cache holds, or ``None`` where there is none.
    """
    attachment = running.attachment
    assert attachment is not None
    ids = kwargs["input_ids"]
    new = mask[:, -ids.shape[1] :]
    masked = kwargs.get("attention_mask") is not None
    kwargs = dict(kwargs, attention_mask=mask)
    prefix = None
    if slots is not None and slots.planned is not None:
        prefix = slots.planned_prefix
        positions, after = slots.take_planned(ids.shape[1])
        running.rule = ActiveRule(attachment.config, after.table, prefix)
        later: Callable[[], KVSlots] = lambda: after  # noqa: E731
    elif slots is not None and not blocks and (slots.open_to_text or layout is None):
        own = attachment.family.sequential_of_text(module, new).to(ids.device)
        positions = own + slots.next_position[:, None]
        after = slots.go_on(new.to(ids.device), full=slots.full and not masked)
        if after.full and slots.open_to_text:
            kwargs["attention_mask"] = None  # of ones alone; to see that, the backbone would read it
        if not slots.open_to_text:
            running.rule = ActiveRule(attachment.config, after.table)
        later = lambda: after  # noqa: E731
    else:
        if layout is None:
            layout = SequenceLayout.of_text(new)
        positions = _positions(running, module, layout, kwargs, new, slots)
        table, later = _after(attachment, layout, positions, slots)
        running.rule = ActiveRule(attachment.config, table)
    kwargs["position_ids"] = _agreed(running, module, kwargs.get("position_ids"), positions, new)
    return _Prepared(running, (), kwargs, later)


def _positions(
    running: Running,
    module: torch.nn.Module,
    layout: SequenceLayout,
    kwargs: dict[str, Any],
    mask: torch.Tensor,
    slots: KVSlots | None,
) -> torch.Tensor:
    """Positions of the new tokens, ``(B, N)`` or ``(P, B, N)``."""
    attachment, ids = running.attachment, kwargs["input_ids"]
    assert attachment is not None
    given, start = kwargs.get("position_ids"), None if slots is None else slots.next_position[:, None]
    grids = any(k.endswith("grid_thw") and v is not None for k, v in kwargs.items())
    own = running.mode.positions == "own"
    if own and layout.has_vision and not grids and isinstance(given, torch.Tensor) and given.ndim == 3:
        # generate encodes the images itself and keeps their grids; its 3-axis positions count as the backbone
        # does
        sequential = given[-3:].to(ids.device)
        sequential = sequential if start is None else sequential - start
    else:
        sequential = attachment.family.sequential(module, ids, mask, kwargs).to(ids.device)
    if attachment.config.positions == "compact":
        sequential = compact_positions(layout, sequential)
    return sequential if start is None else sequential + start


def _after(
    attachment: Attachment, layout: SequenceLayout, positions: torch.Tensor, slots: KVSlots | None
) -> tuple[TokenTable, Callable[[], KVSlots]]:
    """The table of every slot after this forward, and what the KV cache is to remember if there is one."""
    device = positions.device
    if slots is None:
        table = TokenTable.from_layout(layout)  # on the CPU: only a dense mask needs it on the device
    else:
        steps = torch.arange(layout.num_tokens, device=device)
        block = sent(layout.block, device)
        block = torch.where(block >= 0, block + slots.num_blocks[:, None], block)
        new = TokenTable(sent(layout.kind, device), block, slots.next_order[:, None] + steps)
        table = slots.table.to(device).append(new, ordered=slots.table.ordered)

    def later() -> KVSlots:
        compact = attachment.config.positions == "compact"
        counted = layout.in_stream if compact else layout.kind != TokenKind.PAD
        flat = positions if positions.dim() == 2 else positions.amax(dim=0)
        last = torch.where(sent(counted, device), flat, torch.full_like(flat, -1)).amax(dim=1) + 1
        blocks = sent(torch.tensor([len(layout.row_spans(r)) for r in range(layout.num_rows)]), device)
        if slots is None:
            order = torch.full_like(last, layout.num_tokens)
            return KVSlots(table.to(device), last.clamp_min(0), order, blocks)
        return KVSlots(
            table,
            torch.maximum(last, slots.next_position),
            slots.next_order + layout.num_tokens,
            slots.num_blocks + blocks,
        )

    return table, later


def _prepare_packed(running: Running, module: torch.nn.Module, kwargs: dict[str, Any]) -> _Prepared:
    """As :func:`_prepare`, of packed rows: their documents are kept apart under every rule."""
    attachment = running.attachment
    assert attachment is not None
    packed = prepare_packed(attachment, module, kwargs, given_cache(kwargs))
    if attachment.config.frozen_stage1 and packed.layout.has_vision:
        raise ValueError(
            "this model's stage 1 is frozen (frozen_stage1); packed rows are one pass over both."
        )
    if attachment.embeddings is not None:
        if attachment.embeddings.compressor.reads_question:
            raise ValueError(
                f"compressor={attachment.config.compressor!r} reads the question behind an image, which "
                "packed "
                "rows do not keep apart; train it without packing."
            )
        running.places = attachment.embeddings.places(packed.blocks, attachment.vocab, None, kwargs)
    running.rule = ActiveRule(attachment.config, packed.table)
    _stages(running, module, packed.kwargs, packed.layout)
    given, new = packed.kwargs.get("position_ids"), packed.kwargs["attention_mask"]
    packed.kwargs["position_ids"] = _agreed(running, module, given, packed.positions, new)
    rows, tokens = new.shape
    none = torch.zeros(rows, dtype=torch.long, device=new.device)
    return _Prepared(running, (), packed.kwargs, lambda: KVSlots(packed.table, none, none + tokens, none))


def _mask(given: Any, ids: torch.Tensor, length: int, slots: KVSlots | None) -> torch.Tensor:
    """The 2-D mask over past and new tokens, ``(B, L + N)``; where none was given, of all but
    cached padding."""
    rows, tokens = ids.shape
    if not isinstance(given, torch.Tensor) or given.ndim != 2:
        new = torch.ones(rows, length + tokens, dtype=torch.long, device=ids.device)
        if given is None and slots is not None and slots.table.kind.shape == (rows, length):
            new[:, :length] = slots.table.kind != TokenKind.PAD
        return new
    if given.shape[1] != length + tokens:
        raise ValueError(
            f"attention_mask has {given.shape[1]} columns; {length} cached + {tokens} new tokens need "
            f"{length + tokens}."
        )
    return given


def _agreed(
    running: Running, module: torch.nn.Module, given: Any, own: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The positions to use: the rule's ``own``, unless the caller's are taken as given; a contradiction
    raises.

    Args:
        mask: ``(B, N)``, of the new tokens.
    """
    attachment, policy = running.attachment, running.mode.positions
    assert attachment is not None
    if policy == "given" and given is not None:
        return given
    if policy == "check" and given is not None:
        flat, mine = given.to(own.device), own
        if flat.dim() == 3 and mine.dim() == 3:
            flat = flat[-mine.shape[0] :]  # some families put 1-D text positions in front
        elif flat.dim() != mine.dim():
            flat, mine = (flat[-1] if flat.dim() == 3 else flat), (mine[0] if mine.dim() == 3 else mine)
        real = mask.to(own.device).bool()
        if flat.shape[-1] != mine.shape[-1] or bool(((flat != mine) & real).any()):
            raise ValueError(
                f"position_ids given do not agree with positions={attachment.config.positions!r} of the VoCo "
                "config; leave position_ids out."
            )
    return attachment.family.shape_positions(module, own)


# -- remember


@torch.compiler.disable
def _finish(prepared: _Prepared, module: torch.nn.Module, output: Any) -> None:
    """Check that what was prepared was used; let the KV cache remember its slots."""
    running = prepared.running
    if running.places is not None and not running.places.written:
        assert running.attachment is not None
        config = running.attachment.config
        raise RuntimeError(
            f"{type(module).__name__} did not hand its merged embeddings to its decoder, so "
            f"compressor={config.compressor!r} with token_init={config.token_init!r} was not applied; this "
            "family takes token_init='learned' only."
        )
    if running.rule is not None and running.rule.masks_built == 0:
        raise RuntimeError(
            f"{type(module).__name__} built no attention mask through transformers' mask interface, so the "
            "isolation rule was not applied; this family is not supported."
        )
    if prepared.slots is None or running.mode.stage_one:  # stage 1's caches are cut, not gone on from
        return
    past = given_cache(prepared.kwargs)
    past = past if isinstance(past, Cache) else cache_of(output)
    if isinstance(past, Cache):
        remember(past, prepared.slots())


__all__ = [
    "ONE_PASS",
    "OWN_POSITIONS",
    "STAGE_ONE",
    "UNTOUCHED",
    "ForwardMode",
    "Running",
    "TakesBlockEmbeddings",
    "UnderRule",
    "active_rule",
    "as_cache",
    "cache_of",
    "given_cache",
    "handing",
    "in_force",
    "run_forward",
    "running_forward",
]
