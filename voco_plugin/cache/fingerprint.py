"""What made a cache: hashes of model, adapter and processor, and the rule. A cache of another is refused by
name.

The hash of a weight covers its name, shape, dtype and values: all of them up to 2^16 values, a strided sample
of 2^14 above (reading 14 GB for every image would cost more than compressing it), and always the VoCo token's
row. It tells models apart; it is no proof against an attacker who knows which values are sampled.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..config import VoCoConfig
from ..core.adapter_stages import BOTH, COMPRESS
from ..core.attachment import Attachment, unwrap
from .adapters import Names, reader_weights, tuners_of
from .offload import Offloaded
from .seen import Seen
from .settings import ConfigSettings, adapter_settings

_WHOLE, _SAMPLE = 1 << 16, 1 << 14
_RULE_FIELDS = (
    "rule",
    "block_context",
    "positions",
    "block_sink",
    "hide_prefix",
    "token_init",
    "compressor",
)
_NOT_READ = ("num_batches_tracked", "trainable_tokens_original")
"""Buffers that are saved and change nothing: counters, and what an adapter's rows were before."""
_OF_THE_MAKER = (
    "model",
    "adapter",
    "adapter_settings",
    "adapter_stages",
    "processor",
    "token_init",
    "compressor",
)
"""What says who made a block, and not who can read it, where the base reads (``adapter_stages``)."""
_PARTS = ("settings", "adapter_settings")
_HASH = re.compile(r"[0-9a-f]{16,}")
_SINCE = {"compressor": "voco", "frozen_stage1": False, "adapter_stages": BOTH}
"""What a cache is taken to be made with where it was written before this was named."""


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, out of its parts where FSDP2 or tensor parallelism has cut it up (every process asks)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _hash_tensor(sha: Any, name: str, tensor: torch.Tensor, without_row: int | None = None) -> None:
    """Args:
    without_row: a row ``(d,)`` of a matrix that counts as zeros.
    """
    whole = _whole(tensor)
    flat = whole.reshape(-1)
    step = flat.numel() // _SAMPLE if flat.numel() > _WHOLE else 1
    flat = flat[::step]
    if without_row is not None:
        places = torch.arange(0, whole.numel(), step, device=flat.device)
        flat = torch.where(places // whole.shape[1] == without_row, torch.zeros_like(flat), flat)
    sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    sha.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())


def model_hashes(model: torch.nn.Module, voco_id: int) -> dict[str, Any]:
    """What a transformers model computes with: ``model`` and ``adapter``, hashes of the weights that take
    part, ``settings`` (:mod:`.settings`) and, where an adapter is active, ``adapter_settings``. Weights are
    read anew only when something changed.
    """
    weights, settings = _seen(model, voco_id)
    return {**weights.hashes, "settings": {**settings.values, **weights.buffers}}


def reader_hash(model: torch.nn.Module, voco_id: int) -> str:
    """Hash of the weights that the base of ``model`` reads text with: those of the language model without
    adapters and without the VoCo token's row. Another adapter on the same base has the same, and so has the
    base alone.
    """
    weights, _ = _seen(model, voco_id)
    if weights.reader is None:
        weights.reader = _reader(unwrap(model), voco_id)
    return weights.reader


@dataclass
class _Weights:
    """Hashes of a model's weights as it was seen, of the buffers that it is saved with, and of what its base
    reads with, once somebody asked.
    """

    hashes: dict[str, Any]
    buffers: dict[str, str]
    reader: str | None = None


def _seen(model: torch.nn.Module, voco_id: int) -> tuple[_Weights, ConfigSettings]:
    model = unwrap(model)  # under a wrapper parameters have longer names
    seen, weights, settings = vars(model).get("_voco_hashes", (Seen(), None, None))
    if weights is None or not seen.still(model, voco_id):
        seen, weights = Seen(model, voco_id), _Weights(*_hashes(model, voco_id))
    if settings is None or not settings.still(model.config):
        settings = ConfigSettings(model.config)
    object.__setattr__(model, "_voco_hashes", (seen, weights, settings))
    return weights, settings


def _reader(model: torch.nn.Module, voco_id: int) -> str:
    kept, sha = Offloaded(model), hashlib.sha256()
    for called, name, weight, rows in sorted(reader_weights(model), key=lambda part: part[0]):
        _hash_tensor(sha, called, kept.value(name, weight), voco_id if rows else None)
    return sha.hexdigest()[:32]


def _hashes(model: torch.nn.Module, voco_id: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Hashes of the weights that take part, and of the buffers that the model is saved with."""
    tuners = tuners_of(model)
    names, base, adapter = Names(tuners), hashlib.sha256(), hashlib.sha256()
    kept, own = Offloaded(model), dict(model.named_parameters())
    called = [(*names(name), name) for name in own]
    for called_so, of_adapter, name in sorted(called, key=lambda part: part[0] or ""):
        if called_so is not None:
            _hash_tensor(adapter if of_adapter else base, called_so, kept.value(name, own[name]))
    embedding = model.get_input_embeddings().weight
    if embedding.is_meta:
        embedding = kept.value(next(name for name, weight in own.items() if weight is embedding), embedding)
    base.update(_whole(embedding)[voco_id].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    active = [tuner for tuner in tuners if tuner.active]
    lines = sorted(f"{tuner.name}:{tuner.called}:False" for tuner in active)
    adapter.update("\n".join(lines).encode())
    hashes: dict[str, Any] = {
        "model": base.hexdigest()[:32],
        "adapter": adapter.hexdigest()[:32] if active else "none",
    }
    saved, of_adapters = _buffers(model, names, kept)
    if active:
        hashes["adapter_settings"] = adapter_settings(active) | of_adapters
    return hashes, saved


def _buffers(model: torch.nn.Module, names: Names, kept: Offloaded) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of the buffers that are saved, the model's own and its active adapters'. What a config makes,
    such as the angles of rope, is not saved and told by the config.
    """
    hashes = {False: hashlib.sha256(), True: hashlib.sha256()}
    found = {False: False, True: False}
    for prefix, module in model.named_modules():
        for name, buffer in sorted(module._buffers.items()):
            called, of_adapter = names(f"{prefix}.{name}")
            saved = buffer is not None and name not in module._non_persistent_buffers_set
            if not saved or called is None or any(part in _NOT_READ for part in (name, *prefix.split("."))):
                continue
            _hash_tensor(hashes[of_adapter], called, kept.value(f"{prefix}.{name}", buffer))
            found[of_adapter] = True
    own, adapters = (
        {"buffers": hashes[kind].hexdigest()[:16]} if found[kind] else {} for kind in (False, True)
    )
    return own, adapters


def processor_hash(processor: Any) -> str:
    """Hash of what decides the pixels: the image (and video) processor's settings."""
    parts = []
    for name in ("image_processor", "video_processor"):
        part = getattr(processor, name, None)
        if part is not None:
            parts.append(_settings(part))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32] if parts else "none"


_TOLD: weakref.WeakKeyDictionary[Any, tuple[dict[str, Any], str]] = weakref.WeakKeyDictionary()


def _settings(part: Any) -> str:
    """A processor's settings as text. Writing them out copies them all: done again only when one changed."""
    told = _TOLD.get(part)
    try:
        if told is not None and told[0] == vars(part):
            return told[1]
    except (RuntimeError, ValueError):  # a setting that is an array: equal or not is no single answer
        pass
    values = {k: v for k, v in part.to_dict().items() if not k.endswith("_processor_type")}
    text = json.dumps(values, sort_keys=True, default=str)
    with contextlib.suppress(TypeError):  # what takes no weak reference is written out each time
        _TOLD[part] = (copy.deepcopy(vars(part)), text)
    return text


def fingerprint(model: torch.nn.Module, config: VoCoConfig, processor: Any, voco_id: int) -> dict[str, Any]:
    """The fingerprint of ``model`` as it reads now: of what text's keys and values are made by. For blocks it
    is :func:`block_fingerprint`.
    """
    model = unwrap(model)
    return {
        **model_hashes(model, voco_id),
        "processor": processor_hash(processor) if processor is not None else "none",
        "name": str(getattr(model.config, "model_type", type(model).__name__)),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "num_tokens": config.num_tokens,
        **{name: getattr(config, name) for name in _RULE_FIELDS},
        **({"frozen_stage1": True} if config.frozen_stage1 else {}),
        **({"adapter_stages": config.adapter_stages} if config.adapter_stages != BOTH else {}),
        **({"reader": reader_hash(model, voco_id)} if config.adapter_stages == COMPRESS else {}),
    }


def block_fingerprint(
    model: torch.nn.Module, config: VoCoConfig, processor: Any, voco_id: int
) -> dict[str, Any]:
    """The fingerprint of the blocks that ``model`` would compress now: the model's own, or, where its stage 1
    is frozen, that of the model it was trained from, which makes the same blocks.
    """
    return of_blocks(fingerprint(model, config, processor, voco_id))


def of_blocks(reader: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of the blocks that the model of fingerprint ``reader`` compresses."""
    made_by = dict(reader)
    return without_adapter(made_by) if made_by.pop("frozen_stage1", False) else made_by


def as_told(made_by: dict[str, Any], others: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """``made_by`` with what all of ``others`` were told: where one was written before there were settings,
    the keys beside it are made without them.
    """
    if all("settings" in other for other in others):
        return made_by
    return {name: value for name, value in made_by.items() if name not in _PARTS}


def without_adapter(made_by: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of the model of fingerprint ``made_by`` with its adapters switched off."""
    base = {name: value for name, value in made_by.items() if name != "adapter_settings"}
    return {**base, "adapter": "none"}


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """In words, what two fingerprints disagree on, what a person can read first. ``num_tokens`` is the
    blocks' own business (``first(k)``); what was written before ``settings`` were told is taken to have
    them.
    """
    tell = "settings" in expected and "settings" in found
    wrong: list[str] = []
    hashes: list[str] = []
    for name in sorted(set(expected) | set(found)):
        if name in _PARTS:
            if name == "adapter_settings" and "none" in (expected.get("adapter"), found.get("adapter")):
                continue  # one has no adapter, which is said
            for part in _settings_apart(expected.get(name) or {}, found.get(name) or {}) if tell else ():
                wrong.append(("adapter's " if name == "adapter_settings" else "") + part)
            continue
        here, there = (made.get(name, _SINCE.get(name)) for made in (expected, found))
        if name == "num_tokens" or here == there or (name == "processor" and "none" in (here, there)):
            continue
        if any(isinstance(value, str) and _HASH.fullmatch(value) for value in (here, there)):
            hashes.append(f"the {name} is another one ({_short(there)}, not {_short(here)})")
        else:
            wrong.append(f"{name} is {there!r}, not {here!r}")
    return wrong + hashes


def as_reader(mine: dict[str, Any], model: torch.nn.Module, voco_id: int) -> dict[str, Any]:
    """The fingerprint ``mine`` of ``model`` for :func:`differences_to_reader`: a model without an adapter is
    the base that reads what ``adapter_stages="compress"`` made.
    """
    return {**mine, "reader": reader_hash(model, voco_id)} if mine["adapter"] == "none" else mine


def differences_to_reader(mine: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """:func:`differences` of what is to be read, ``found``, and the model that reads, ``mine``."""
    return differences(*compared(mine, found))


def compared(mine: dict[str, Any], found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of ``mine``, a model that reads, and of what it is to read must be the same. Where the base reads
    (``adapter_stages="compress"``) that is the reader, whoever made the blocks; else it is everything.
    """
    if found.get("adapter_stages") == COMPRESS and "reader" in mine:
        own, other = (
            {name: value for name, value in made.items() if name not in _OF_THE_MAKER}
            for made in (mine, found)
        )
        return own, other
    if mine.get("adapter_stages") == COMPRESS:
        return mine, found
    return {name: value for name, value in mine.items() if name != "reader"}, found


def _short(value: Any) -> str:
    """Enough of a hash to tell two apart."""
    return f"{value[:8]}…" if isinstance(value, str) and _HASH.fullmatch(value) else str(value)


def _settings_apart(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    names = [name for name in sorted(set(here) | set(there)) if here.get(name) != there.get(name)]
    usual = "as its class has it"
    values = [[repr(part[name]) if name in part else usual for part in (there, here)] for name in names]
    return [f"{name} is {theirs}, not {ours}" for name, (theirs, ours) in zip(names, values, strict=True)]


def check_nested(made_by: dict[str, Any]) -> None:
    """Refuse to cut blocks whose tokens hang on how many there are.

    Raises:
        ValueError: as :meth:`~voco_plugin.cache.VoCoCache.first` says.
    """
    compressor, init = made_by.get("compressor", "voco"), made_by.get("token_init", "learned")
    if compressor != "voco" or init == "pooled":
        raise ValueError(
            f"the tokens of these blocks (compressor={compressor!r}, token_init={init!r}) were made for "
            "their whole number, and the first k are not what k tokens would be; compress again with "
            "compress(num_tokens=k)."
        )


def made_by(model: torch.nn.Module, state: Attachment) -> dict[str, Any]:
    """The fingerprint of this attached model as it reads now."""
    return fingerprint(model, state.config, state.processor, state.vocab.voco_id)


def blocks_made_by(model: torch.nn.Module, state: Attachment) -> dict[str, Any]:
    """The fingerprint of the blocks that this attached model makes now."""
    return of_blocks(made_by(model, state))


def check_cache(model: torch.nn.Module, state: Attachment, cache: Any) -> dict[str, Any]:
    """The model's fingerprint (as it reads); refuses a cache that this model did not make under this rule.

    Raises:
        ValueError: it says what differs.
    """
    if state.config.rule == "causal":
        raise ValueError(
            "rule='causal' has no cached inference: text reads the vision tokens; use rule='isolated'."
        )
    mine = made_by(model, state)
    if not len(cache):
        return mine
    if not cache.fingerprint:
        raise ValueError(
            "this cache has no fingerprint, so it cannot be told which model made it; make it with "
            "model.compress, or give VoCoCache(…, fingerprint=…) the fingerprint of the cache it came from."
        )
    expected = of_blocks(mine)
    if state.family.prefix_lm and "attention" in cache.fingerprint:
        expected["attention"] = cache.fingerprint["attention"]  # told by stage 1's inputs, not by the model
    if cache.fingerprint.get("adapter_stages") == COMPRESS:
        expected = as_reader(expected, model, state.vocab.voco_id)
    wrong = differences_to_reader(expected, cache.fingerprint)
    if wrong:
        raise ValueError(
            "this cache was not made by this model under this rule; compress the images again, or load the "
            f"model that made it: {'; '.join(wrong)}."
        )
    return mine
