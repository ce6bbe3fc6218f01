"""Stage 1 (paper, Sec. 3.3, Fig. 4): ``[vision, VoCo]`` through the backbone; the VoCo tokens' keys and
values stay.

With ``block_context="self"`` every block is a row of its own, whatever prompt it stood in: nothing of the
text is computed, the LM head never runs, and the last layer runs over the VoCo tokens alone. Blocks of one
length share a forward, in chunks of a size the caller may limit, each with its own rows of the vision inputs:
nothing is padded. With ``"prefix"`` the stream before a block belongs to what it computes, so the rows run as
they are, up to the last block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..._compat import cache_names
from ...config import VOCO
from ...core.adapter_switch import can_leave_out_adapters
from ...core.attachment import Attachment
from ...core.forward import STAGE_ONE, ForwardMode, as_cache
from ...core.kv_cache import KVSlots, VoCoKVCache
from ...core.layout import BlockSpan, SequenceLayout, compact_positions, is_per_token, sent
from ..cache import VoCoBlock, VoCoCache
from ..fingerprint import block_fingerprint
from .batching import Limits, chunks_of
from .last_rows import LastSlotsCache, NotCut, last_rows, plan_last_rows, voco_rows_only
from .num_voco_tokens import recut
from .vision_inputs import VisionInputs, vision_inputs

_log = logging.getLogger(__name__)

_DROPPED = (
    "labels",
    "use_cache",
    *cache_names(),
    "position_ids",
    "logits_to_keep",
    "return_dict",
    "inputs_embeds",
)


@dataclass
class Starts:
    """Where blocks and rows begin, as the host knows: read from the device once a batch, however many images.

    Attributes:
        voco: per block, the position of its first VoCo token.
        extent: per block, how far positions advance over its vision tokens.
        first_real: per row, the column of its first real token.
    """

    voco: list[int]
    extent: list[int]
    first_real: list[int]

    @classmethod
    def of(cls, positions: torch.Tensor, mask: torch.Tensor, layout: SequenceLayout) -> Starts:
        places = torch.tensor([(s.row, s.voco, s.start) for s in layout])
        row, voco, start = sent(places, positions.device).T
        axes = positions if positions.dim() == 3 else positions[None]
        first = axes[0, row, voco]
        extent = first - axes[:, row, start].amax(dim=0)
        # left padding is no part of the sequence
        first_real = mask.to(positions.device).long().argmax(dim=1)
        read = torch.cat([first, extent, first_real]).tolist()
        count = len(layout.spans)
        return cls(read[:count], read[count : 2 * count], read[2 * count :])


@dataclass
class Batch:
    """What a batch's blocks are cut from. ``tokens``: the per-token inputs by name, ``(R, N)``.

    ``replayed``: whether layers may run a second time, in a backward pass that recomputes them.
    """

    model: Any
    state: Attachment
    tokens: dict[str, torch.Tensor]
    vision: VisionInputs
    layout: SequenceLayout
    positions: torch.Tensor
    starts: Starts
    replayed: bool = False


def _pad_id(model: torch.nn.Module, vocab: Any) -> int:
    """An id for padding that no image feature is scattered to."""
    special = vocab.placeholders | vocab.markers
    for token in (getattr(model.config.get_text_config(), "pad_token_id", None), 0, 1, 2):
        if isinstance(token, int) and token >= 0 and token not in special:
            return token
    return vocab.voco_id


def _blocks_as_rows(
    tokens: dict[str, torch.Tensor], spans: list[BlockSpan], positions: torch.Tensor, pad: int
) -> dict[str, torch.Tensor]:
    """Each block's tokens as one row, right-padded where lengths differ: inputs, mask ``(b, M)`` and
    positions ``(…, b, M)``.
    """
    ids = tokens["input_ids"]
    longest = max(s.stop - s.start for s in spans)
    offsets = torch.arange(longest, device=ids.device)
    places = torch.tensor([(s.start, s.stop - s.start, s.row) for s in spans])
    starts, lengths, rows = sent(places, ids.device).T
    rows = rows[:, None]
    mask = (offsets < lengths[:, None]).long()
    columns = (starts[:, None] + offsets).clamp_max(ids.shape[1] - 1)

    def take(value: torch.Tensor) -> torch.Tensor:
        return value[..., rows, columns]

    gathered = {name: take(value) * mask.to(value.dtype) for name, value in tokens.items()}
    gathered["input_ids"] = torch.where(mask.bool(), take(ids), pad)
    gathered["attention_mask"] = mask
    gathered["position_ids"] = take(positions)
    return gathered


def compress(
    model: torch.nn.Module,
    state: Any,
    inputs: dict[str, Any],
    num_tokens: int | None = None,
    limits: Limits | None = None,
) -> VoCoCache:
    """Compress every block of a batch; see
    :meth:`~voco_plugin.inference.mixin.VoCoGenerationMixin.compress`.
    """
    if state.config.rule == "causal":
        raise ValueError(
            "rule='causal' lets text read the vision tokens, so there is nothing to compress; use "
            "rule='isolated'."
        )
    state.check_reusable("compress")
    if inputs.get("input_ids") is None:
        raise ValueError("compress needs input_ids that hold the vision and VoCo tokens.")
    layout = SequenceLayout.from_ids(inputs["input_ids"], inputs.get("attention_mask"), state.vocab)
    if num_tokens is not None:
        inputs = recut(inputs, layout, num_tokens, _pad_id(model, state.vocab))
        layout = SequenceLayout.from_ids(inputs["input_ids"], inputs.get("attention_mask"), state.vocab)
    made_by = block_fingerprint(model, state.config, state.processor, state.vocab.voco_id)
    if state.family.prefix_lm:
        made_by["attention"] = attention_of(inputs)
    if not layout.spans:
        return VoCoCache([], [], inputs["input_ids"].shape[0], made_by)
    whole = state.config.block_context == "prefix"
    if whole and made_by.get("attention") == "prefix":
        raise ValueError(
            "block_context='prefix' cannot be cached for a backbone that reads its prompt both ways: what a "
            "block sees before it has read the text after it; use block_context='self'."
        )
    batch = read_batch(model, state, inputs, layout)
    vision = batch.vision
    blocks: list[VoCoBlock | None] = [None] * len(layout.spans)
    if whole:
        if limits is not None:
            limits.check_whole(model, layout, vision)
        for number, block in enumerate(_run_prefix(batch)):
            blocks[number] = block
    else:
        alone = len(layout.spans) == 1 and limits is None
        for chunk in [[(0, 1)]] if alone else chunks_of(model, layout.spans, vision, limits or Limits()):
            numbers = [n for first, stop in chunk for n in range(first, stop)]
            for number, block in zip(numbers, run_alone(batch, chunk, numbers)[0], strict=True):
                blocks[number] = block
    made = [block for block in blocks if block is not None]
    return VoCoCache(made, [s.row for s in layout.spans], inputs["input_ids"].shape[0], made_by)


def attention_of(inputs: dict[str, Any]) -> str:
    """How a prefix-LM reads these inputs: ``prefix`` (both ways), or ``causal`` without token types."""
    return "causal" if inputs.get("token_type_ids") is None else "prefix"


def read_batch(model: torch.nn.Module, state: Any, inputs: dict[str, Any], layout: SequenceLayout) -> Batch:
    """The inputs of a forward, ready to be cut into blocks: positions in this prompt, and whose pixels are
    whose.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    backbone = state.family.backbone(model)
    sequential = state.family.sequential(backbone, ids, mask, inputs).to(ids.device)
    compact = state.config.positions == "compact"
    positions = compact_positions(layout, sequential) if compact else sequential
    shape = (ids.shape[0], ids.shape[1])
    given = {k: v for k, v in inputs.items() if k not in _DROPPED and v is not None}
    tokens = {k: v for k, v in given.items() if is_per_token(k, v, shape)}
    others = {k: v for k, v in given.items() if k not in tokens}
    if state.config.block_context == "prefix":
        vision = VisionInputs(
            others, {}, [0, len(layout.spans)], "block_context='prefix' computes whole rows"
        )
    elif len(ids) == 1 and len(layout.spans) == 1:
        vision = VisionInputs(others, {}, [0, 1])  # all of it is the one block's
    else:
        vision = vision_inputs({**others, "input_ids": ids}, layout.spans, state.vocab, model.config,
                               by_row=state.family.images_by_row)  # fmt: skip
    starts = Starts.of(positions, mask, layout)
    return Batch(model, state, {**tokens, "attention_mask": mask}, vision, layout, positions, starts)


def run_alone(
    batch: Batch, chunk: list[tuple[int, int]], numbers: list[int], read_on: bool = False
) -> tuple[list[VoCoBlock], torch.Tensor | None]:
    """One forward over the blocks of ``chunk``, each a row of its own.

    Args:
        read_on: whether the backbone's output is read too, and the last layer runs whole.

    Returns:
        the blocks; with ``read_on`` the last hidden states ``(b, M, d)``, else ``None``.
    """
    state, model = batch.state, batch.model
    spans = [batch.layout.spans[n] for n in numbers]
    run: dict[str, Any] = _blocks_as_rows(batch.tokens, spans, batch.positions, _pad_id(model, state.vocab))
    run |= batch.vision.take(chunk) if batch.vision.rows else batch.vision.shared
    length, kept = spans[0].stop - spans[0].start, spans[0].num_voco
    even = all((s.stop - s.start, s.num_voco) == (length, kept) for s in spans)
    slim = even and not getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    longest = max(s.stop - s.start for s in spans)
    if slim or batch.replayed:
        cache: VoCoKVCache = LastSlotsCache(kept if slim else longest, batch.replayed)
    else:
        cache = VoCoKVCache()  # a config-built one would crop windowed layers
    chunked = state.family.chunk_size(model) is not None
    if chunked:  # chunks are cut where the block stands in its prompt
        orders = [s.start - batch.starts.first_real[s.row] for s in spans]
        cache.voco_slots = KVSlots.starting_at(sent(torch.tensor(orders), batch.positions.device))
    # a row that is one whole block sees all of it: the backbone's own mask says the same as the rule
    text, config = state.family.text_model(model), state.config
    rival = config.compressor != VOCO
    plain = even and not chunked and config.rule == "isolated" and _is_causal(text)
    hidden = None
    if not (plain and slim and rival and _ran_short(batch, run, cache, kept, length)):
        # a hook inside a layer would not be there when that layer is recomputed
        cut = plan_last_rows(text, kept, length, not batch.replayed) if slim and not read_on else None
        with last_rows(cut):
            rule = not plain or rival
            hidden = _forward(state, model, run, cache, replace(STAGE_ONE, rule=rule, cut=cut))
    found = []
    for row, (number, span) in enumerate(zip(numbers, spans, strict=True)):
        start = 0 if slim else span.num_vision
        found.append(_block(batch, number, cache, row, start))
    return found, hidden if read_on else None


def _ran_short(batch: Batch, run: dict[str, Any], cache: LastSlotsCache, kept: int, length: int) -> bool:
    """Run a rival's tokens alone, the vision tokens left out of the LLM; whether that could be done."""
    text = batch.state.family.text_model(batch.model)
    try:
        with voco_rows_only(text, kept, length) as cut:
            _forward(batch.state, batch.model, dict(run), cache, replace(STAGE_ONE, rule=False, cut=cut))
    except NotCut as problem:
        _log.debug("vision tokens not left out: %s", problem)
        return False
    return True


def _is_causal(text_model: torch.nn.Module) -> bool:
    """Whether every attention layer is causal where it is given no mask, as sdpa reads it (PaliGemma's is
    not).
    """
    layers = getattr(text_model, "layers", text_model)
    return all(getattr(module, "is_causal", True) for module in layers.modules())


def _run_prefix(batch: Batch) -> list[VoCoBlock]:
    """One forward over the rows of the batch as they are, up to the last block."""
    stop = max(s.stop for s in batch.layout)
    run: dict[str, Any] = {k: v[:, :stop] for k, v in batch.tokens.items()}
    run |= batch.vision.shared
    run["position_ids"] = batch.positions[..., :stop]
    cache = VoCoKVCache()
    _forward(batch.state, batch.model, run, cache, STAGE_ONE)
    return [_block(batch, n, cache, span.row, span.voco) for n, span in enumerate(batch.layout)]


def _forward(
    state: Attachment, model: Any, run: dict[str, Any], cache: VoCoKVCache, mode: ForwardMode
) -> torch.Tensor | None:
    backbone = state.family.backbone(model)
    run["position_ids"] = state.family.shape_positions(backbone, run["position_ids"])
    # asked for a cache where layers are checkpointed, transformers warns that it makes none; it takes ours
    own = not getattr(cache, "replayed", False)
    if state.config.frozen_stage1:
        can_leave_out_adapters(model)
        mode = replace(mode, without_adapter=True)
    output = backbone(**run, **as_cache(cache), use_cache=own, voco_mode=mode)
    return getattr(output, "last_hidden_state", None)  # Llama 4 is its own backbone, and gives logits


def _block(batch: Batch, number: int, cache: VoCoKVCache, row: int, start: int) -> VoCoBlock:
    """The block ``number``, whose VoCo tokens stand at the slots from ``start`` on of ``row``."""
    span, starts = batch.layout.spans[number], batch.starts
    slots = slice(start, start + span.num_voco)
    return VoCoBlock(
        keys=tuple(layer.keys[row, :, slots].clone() for layer in cache.layers),
        values=tuple(layer.values[row, :, slots].clone() for layer in cache.layers),
        position=starts.voco[number],
        extent=starts.extent[number],
        num_vision=span.num_vision,
        relocatable=batch.state.config.block_context == "self",
        order=span.voco - starts.first_real[span.row],
    )
