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
import itertools
import json
import operator
import re
import weakref
from typing import Any

import torch

from ..config import VoCoConfig
from ..core.adapter_switch import is_tuner
from ..core.attachment import Attachment, unwrap

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
_HASH = re.compile(r"[0-9a-f]{16,}")
_SINCE = {"compressor": "voco", "frozen_stage1": False}
"""What a cache is taken to be made with where it was written before this was named."""


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, out of its parts where FSDP2 or tensor parallelism has cut it up (every process asks)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _hash_tensor(sha: Any, name: str, tensor: torch.Tensor) -> None:
    flat = _whole(tensor).reshape(-1)
    if flat.numel() > _WHOLE:
        flat = flat[:: flat.numel() // _SAMPLE]
    sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    sha.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())


def _is_adapter(name: str) -> bool:
    return any(
        part.startswith(("lora_", "trainable_tokens_", "ia3_", "oft_", "vera_")) for part in name.split(".")
    )


class _Seen:
    """The state of a model that a hash was computed for; weak references: it keeps no weight in memory.

    It is asked for every prompt, in front of the first token: no names are built, and nothing is computed
    but lists of what is there, compared with what was.
    """

    def __init__(self, model: torch.nn.Module | None = None, voco_id: int = -1) -> None:
        modules = [] if model is None else list(model.modules())
        self.modules = [weakref.ref(module) for module in modules]
        self.parameters = [None if p is None else weakref.ref(p) for p in _parameters(modules)]
        self.found = None if model is None else _found(modules, _parameters(modules))
        self.voco_id = voco_id

    def __reduce__(self) -> tuple:
        return _Seen, ()  # a copied or unpickled model computes its own

    def still(self, model: torch.nn.Module, voco_id: int) -> bool:
        """Whether ``model`` is as it was: the same modules, and in them the same tensors, not written to."""
        modules = [ref() for ref in self.modules]
        if voco_id != self.voco_id or not modules or modules[0] is not model or None in modules:
            return False
        parameters = _parameters(modules)
        known = [None if ref is None else ref() for ref in self.parameters]
        return (
            len(known) == len(parameters)
            and all(map(operator.is_, known, parameters))
            and _found(modules, parameters) == self.found
        )


def _parameters(modules: list[Any]) -> list[torch.nn.Parameter | None]:
    return [*itertools.chain.from_iterable([module._parameters.values() for module in modules])]


def _found(modules: list[Any], parameters: list[torch.nn.Parameter | None]) -> tuple[list, ...]:
    """What tells a state from another: the tree, what was written to, and which adapters are on."""
    children = itertools.chain.from_iterable([module._modules.values() for module in modules])
    tuners = [module for module in modules if is_tuner(type(module))]
    return (
        [*map(id, children)],
        [None if p is None else (p._version, p.dtype) for p in parameters],
        [(tuple(module.active_adapters), module.disable_adapters) for module in tuners],
    )


def model_hashes(model: torch.nn.Module, voco_id: int) -> dict[str, str]:
    """``{"model": …, "adapter": …}`` of a transformers model; computed anew only when a weight changed."""
    model = unwrap(model)  # under a wrapper parameters have longer names
    cached = vars(model).get("_voco_hashes")
    if cached is not None and cached[0].still(model, voco_id):
        return cached[1]
    named = dict(model.named_parameters())
    base, adapter = hashlib.sha256(), hashlib.sha256()
    has_adapter = False
    for name in sorted(named):
        if _is_adapter(name):
            has_adapter = True
            _hash_tensor(adapter, name, named[name])
        else:
            _hash_tensor(base, name.replace(".base_layer", ""), named[name])
    embedding = _whole(model.get_input_embeddings().weight)
    base.update(embedding[voco_id].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    tuners = sorted(
        f"{name}:{m.active_adapters}:{m.disable_adapters}"
        for name, m in model.named_modules()
        if is_tuner(type(m))
    )
    adapter.update("\n".join(tuners).encode())
    hashes = {"model": base.hexdigest()[:32], "adapter": adapter.hexdigest()[:32] if has_adapter else "none"}
    object.__setattr__(model, "_voco_hashes", (_Seen(model, voco_id), hashes))
    return hashes


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
    if made_by.pop("frozen_stage1", False):
        made_by["adapter"] = "none"
    return made_by


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """In words, what two fingerprints disagree on, what a person can read first. ``num_tokens`` is the
    blocks' own business (``first(k)``).
    """
    wrong: list[str] = []
    hashes: list[str] = []
    for name in sorted(set(expected) | set(found)):
        here, there = (made.get(name, _SINCE.get(name)) for made in (expected, found))
        if name == "num_tokens" or here == there or (name == "processor" and "none" in (here, there)):
            continue
        if any(isinstance(value, str) and _HASH.fullmatch(value) for value in (here, there)):
            hashes.append(f"the {name} is another one ({_short(there)}, not {_short(here)})")
        else:
            wrong.append(f"{name} is {there!r}, not {here!r}")
    return wrong + hashes


def _short(value: Any) -> str:
    """Enough of a hash to tell two apart."""
    return f"{value[:8]}…" if isinstance(value, str) and _HASH.fullmatch(value) else str(value)


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
    wrong = differences(expected, cache.fingerprint)
    if wrong:
        raise ValueError(
            "this cache was not made by this model under this rule; compress the images again, or load the "
            f"model that made it: {'; '.join(wrong)}."
        )
    return mine
