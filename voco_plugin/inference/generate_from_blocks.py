"""``generate`` on placed blocks: what stands between transformers' decoding loops and a KV cache whose first
slots have no token ids.

Stock ``generate`` takes a KV cache with input ids that follow it. That is enough for greedy search, sampling
and beams. A static cache and an assistant model count on ids for every slot: they get a head start, that is,
the prompt is read first, under the rule, and generation goes on from its last token.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, StaticCache
from transformers.generation.configuration_utils import (
    ALL_CACHE_IMPLEMENTATIONS,
    ALL_STATIC_CACHE_IMPLEMENTATIONS,
)

from ..cache.place.stage_two import Placed
from ..config import nearest
from ..core.attachment import Attachment
from ..core.forward import OWN_POSITIONS, as_cache, cache_of, given_cache
from ..core.kv_cache import KVSlots, RemembersSlots

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
_DYNAMIC = (None, "dynamic", "dynamic_full")
_DEFAULTS = GenerationConfig()
_MASK_ELEMENTS = 1 << 25
"""Of the dense mask of a prompt's text: 10,000 images with a line break each are 200 million at once."""
_SHORTEST_CHUNK = 256
_DELTAS = "rope_deltas"


def by_name(args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of ``generate`` that were given by position after the prompt, by name.

    Raises:
        TypeError: there are too many, or one is given twice.
    """
    names = list(inspect.signature(GenerationMixin.generate).parameters)[2:-1]  # after self, inputs
    named = dict(zip(names, args, strict=False))
    twice = [name for name in named if name in kwargs]
    if len(args) > len(names) or twice:
        wrong = f"{twice[0]} is given twice" if twice else f"{len(args) + 1} arguments by position"
        raise TypeError(f"generate: {wrong}.")
    return named


def own_config(args: tuple, kwargs: dict) -> tuple:
    """``args``, with a copy of the generation config given in the place of it (also where ``kwargs`` has it),
    so that :func:`change` may write to it.
    """
    if kwargs.get("generation_config") is not None:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
    elif args and args[0] is not None:
        return copy.deepcopy(args[0]), *args[1:]
    return args


def change(args: tuple, kwargs: dict, **values: Any) -> None:
    """Set generation settings where the caller set theirs: in the generation config given
    (:func:`own_config`), or as arguments. Beside a config, ``generate`` wants no arguments.
    """
    config = kwargs.get("generation_config") or (args[0] if args else None)
    for name, value in values.items():
        if config is None or name in kwargs:
            kwargs[name] = value
        else:
            setattr(config, name, value)


def setting(model: Any, args: tuple, kwargs: dict, name: str, default: Any = None) -> Any:
    """A generation setting: of the call, of the generation config given, or, where those leave it open, of
    the model's.
    """
    given = kwargs.get("generation_config") or (args[0] if args else None)
    found = (getattr(config, name, None) for config in (given, getattr(model, "generation_config", None)))
    value = kwargs.get(name)
    for one in found:
        value = one if value is None else value
    return default if value is None else value


def expansion(model: Any, args: tuple, kwargs: dict) -> int:
    """How often ``generate`` repeats each row."""
    beams = setting(model, args, kwargs, "num_beams", 1)
    returned = setting(model, args, kwargs, "num_return_sequences", 1)
    return max(beams, returned)


def is_assisted(model: Any, args: tuple, kwargs: dict) -> bool:
    return any(setting(model, args, kwargs, name) is not None for name in _ASSISTED)


def check_draft(model: Any, kwargs: dict) -> None:
    """An assistant model needs as many rows as the model, which got one for the VoCo token.

    Raises:
        ValueError: it has another number, and no tokenizers were given to translate; or it cannot read the
            positions of a multi-axis family.
    """
    draft = kwargs.get("assistant_model")
    if draft is not None and hasattr(model.base_model, "get_rope_index"):
        if not hasattr(draft.base_model, "get_rope_index"):
            raise ValueError(
                f"assistant_model is a {type(draft).__name__}, which counts positions on one axis, and "
                f"{type(model).__name__} on three; use a small model of the same family."
            )
    if draft is None or kwargs.get("assistant_tokenizer") is not None:
        return
    mine, its = (m.config.get_text_config().vocab_size for m in (model, draft))
    if mine != its:
        raise ValueError(
            f"assistant_model has {its} token rows and this model {mine} (the VoCo token took one); with the "
            f"same tokenizer, call assistant_model.resize_token_embeddings({mine}); with another, give "
            "tokenizer and assistant_tokenizer."
        )


def static_kind(model: Any, args: tuple, kwargs: dict) -> str | None:
    """The static ``cache_implementation`` asked for, or ``None`` for a dynamic cache.

    Raises:
        ValueError: a cache that is neither.
    """
    kind = setting(model, args, kwargs, "cache_implementation")
    if kind in _DYNAMIC:
        return None
    if kind == "static":
        return "static"
    if kind not in ALL_CACHE_IMPLEMENTATIONS:
        raise ValueError(
            f"cache_implementation={kind!r} is not known{nearest(kind, ALL_CACHE_IMPLEMENTATIONS)}; use "
            "'static', or leave it out."
        )
    wrong = "offloads or quantises" if kind not in ALL_STATIC_CACHE_IMPLEMENTATIONS else "cuts"
    raise ValueError(
        f"cache_implementation={kind!r} {wrong} its slots, which a cache of placed blocks does not; use "
        "'static', or leave it out."
    )


def refuse_settings(model: Any, args: tuple, kwargs: dict) -> None:
    """What cannot be had after images, however they are read.

    Raises:
        ValueError: the prompt is to be tokenized again, which would lose its images, or a layer of the model
            is to draft, for which transformers looks in the config of a text model.
    """
    if setting(model, args, kwargs, "token_healing"):
        raise ValueError(
            "token_healing=True tokenizes the prompt again, which loses its images; leave it out."
        )
    if setting(model, args, kwargs, "assistant_early_exit") is not None:
        raise ValueError(
            "assistant_early_exit is for models of text alone; leave it out, or give an assistant_model."
        )


def refuse_in_one_pass(model: Any, args: tuple, kwargs: dict) -> None:
    """A single pass masks the vision tokens in every step, which only a dynamic cache lets it do, and reads
    each image together with its VoCo tokens.
    """
    refuse_settings(model, args, kwargs)
    kind = setting(model, args, kwargs, "cache_implementation")
    if kind not in _DYNAMIC:
        raise ValueError(
            f"cache_implementation={kind!r}: a single pass masks vision tokens in every step, which only a "
            "dynamic cache lets it do; answer from a cache (model.compress), or leave it out."
        )
    if setting(model, args, kwargs, "prefill_chunk_size") is not None:
        raise ValueError(
            "prefill_chunk_size cuts the prompt, and in a single pass an image must stand in one piece with "
            "its VoCo tokens; answer from a cache (model.compress), or leave it out."
        )


def shift_lengths(model: Any, args: tuple, kwargs: dict, by: int) -> None:
    """``max_length`` and ``min_length`` count the prompt that the caller sees; ``by`` is what the prompt that
    generate sees has more.
    """
    for name in ("max_length", "min_length"):
        value = kwargs.get(name)
        if value is None:
            value = setting(model, args, kwargs, name)
            new = setting(model, args, kwargs, "max_new_tokens")
            if not value or value == getattr(_DEFAULTS, name) or (name == "max_length" and new is not None):
                continue
        change(args, kwargs, **{name: max(value + by, 0)})


@contextlib.contextmanager
def without_rope_deltas(model: Any) -> Iterator[None]:
    """Multi-axis families keep, on the model, how far positions of the last prompt were ahead of its tokens,
    a row each, and add it to those of whatever comes next. Inside the block there is none: stage 2 has its
    own positions, and may have another number of rows.
    """
    holders = [m for m in (model, model.base_model) if getattr(m, _DELTAS, None) is not None]
    before = [(holder, getattr(holder, _DELTAS)) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, _DELTAS, None)
        yield
    finally:
        for holder, deltas in before:
            setattr(holder, _DELTAS, deltas)


def prefill_chunk(placed: Placed) -> int | None:
    """Text tokens to read at a time: the mask of a chunk, ``B`` rows by its tokens by all slots, stays within
    :data:`_MASK_ELEMENTS`. ``None``: all at once, which a short prompt is, and one that is read both ways.
    """
    rows, text = placed.input_ids.shape
    slots = KVSlots.of(placed.past)
    if slots is not None and slots.planned_prefix is not None:
        return None
    chunk = max(_MASK_ELEMENTS // (rows * placed.attention_mask.shape[1]), _SHORTEST_CHUNK)
    return chunk if chunk < text else None


def read_placed(read: Any, placed: Placed, chunk: int | None, **kwargs: Any) -> Any:
    """Read the text of a prompt under the rule, ``chunk`` tokens at a time; what its last chunk gives, with
    the logits of the last token alone where there was more than one.

    Args:
        read: the model's forward, given the mode it runs in.
        kwargs: of the forward of the last chunk.
    """
    ids, past = placed.input_ids, placed.past
    slots = placed.attention_mask.shape[1] - ids.shape[1]
    start = 0
    while chunk is not None and start + chunk < ids.shape[1]:
        stop = start + chunk
        output = read(
            OWN_POSITIONS,
            input_ids=ids[:, start:stop],
            attention_mask=placed.attention_mask[:, : slots + stop],
            use_cache=True,
            logits_to_keep=1,
            **as_cache(past),
        )
        start, past = stop, cache_of(output)
    output = read(
        OWN_POSITIONS,
        input_ids=ids[:, start:],
        attention_mask=placed.attention_mask,
        use_cache=True,
        **as_cache(past),
        **kwargs,
    )
    if start:  # a few families give logits of every token, whatever is to be kept
        output["logits"] = output.logits[:, -1:]
    return output


def head_start(
    model: Any,
    state: Attachment,
    placed: Placed,
    types: torch.Tensor | None,
    read: Any,
    chunk: int | None = None,
) -> dict[str, Any]:
    """Read the prompt under the rule; what ``generate`` goes on from: ``input_ids`` ``(B, P + T)`` (any text
    id stands for a slot of a block), ``attention_mask`` and the KV cache up to the last token.

    Args:
        read: the model's forward, given the mode it runs in.
        chunk: tokens to read at a time; ``None``: as many as their mask may have.
    """
    more = {} if types is None else {"token_type_ids": types}
    output = read_placed(read, placed, chunk or prefill_chunk(placed), logits_to_keep=1, **more)
    past = cache_of(output)
    past.crop(-1)
    slots = placed.attention_mask.shape[1] - placed.input_ids.shape[1]
    filler = placed.input_ids[:, -1:].expand(-1, slots)
    past.voco_ids_count = True
    return {
        "input_ids": torch.cat([filler, placed.input_ids], dim=1),
        "attention_mask": placed.attention_mask,
        **as_cache(past),
    }


def to_static(
    model: Any, state: Attachment, started: dict[str, Any], positions: torch.Tensor, max_length: int
) -> dict[str, Any]:
    """``started`` with a static cache of ``max_length`` slots, which ``generate`` may compile for.

    From here on the backbone's own mask says all there is to say, so the static cache is a plain one; only
    the positions are the rule's.

    Args:
        positions: ``(B,)``, of the prompt's last token.

    Raises:
        ValueError: windows, chunks, ``hide_prefix`` or a prefix-LM need the rule in every step.
    """
    why = (
        "hide_prefix=True" if state.config.hide_prefix
        else "sliding or chunked attention" if state.family.windowed(model)
        else "a prefix-LM's own count of positions" if state.family.prefix_lm
        else None
    )  # fmt: skip
    if why is not None:
        raise ValueError(
            f"cache_implementation='static' builds masks and positions outside the model, and with {why} the "
            "rule has a say in every step; leave it out."
        )
    static = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=max_length)
    for index, layer in enumerate(given_cache(started).layers):
        static.update(layer.keys, layer.values, index)
    total = started["input_ids"].shape[1]
    steps = torch.arange(1 - total, 1, device=positions.device)
    own = (positions[:, None] + steps).clamp_min(0)  # only the last one is used
    shaped = state.family.shape_positions(state.family.backbone(model), own)
    return {**started, **as_cache(static), "position_ids": shaped}


def only_new(past: Cache | None, input_ids: torch.Tensor) -> int | None:
    """How many of ``input_ids`` are not in ``past`` yet, where the ids stand for its slots too."""
    if not isinstance(past, RemembersSlots) or not past.voco_ids_count:
        return None
    return input_ids.shape[1] - int(past.get_seq_length())


def with_prompt(output: Any, shown: torch.Tensor, prompt_length: int) -> Any:
    """The caller's ids in place of the ``prompt_length`` ids at the head of the generated sequences."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    new = sequences[:, prompt_length:]
    times = sequences.shape[0] // shown.shape[0]
    joined = torch.cat([shown.repeat_interleave(times, dim=0).to(new.device), new], dim=1)
    if isinstance(output, torch.Tensor):
        return joined
    output.sequences = joined
    return output
