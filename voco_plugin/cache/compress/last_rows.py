"""What stage 1 does not compute, since nothing of it stays.

What stays of a block are its VoCo tokens' keys and values in each layer. So

    the KV cache       keeps the last ``K`` slots of a layer: the vision tokens' keys are gone before the next
    layer
                       makes its own (:class:`LastSlotsCache`)
    the last layer     runs over the VoCo tokens alone: their keys come from their own hidden states, and
    nothing
                       reads what else it computes; its output is put back to full length with zeros
    the layer before   has its feed-forward block, which works token by token, run over those rows alone
    the whole decoder  runs over them alone for a baseline that reads the image outside the LLM

Hooks do the cutting, for as long as a compression runs; each acts in the forward whose mode names its plan
and in no other, be it of another thread or one started inside. A layer given anything that is not known to be
cut this way runs over the whole block, as it would without them (logged at debug level).

Shapes: ``B`` blocks, ``N`` tokens of a block, ``K`` VoCo tokens, ``H`` key-value heads or hidden size, ``D``
head dim.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ...core.forward import running_forward
from ...core.kv_cache import VoCoKVCache

_log = logging.getLogger(__name__)

_ALONG_LAST = ("position_ids", "text_position_ids", "cache_position")
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_UNSHARED = ("shared_kv_states",)  # empty where no layer shares keys; such models are not cut at all
_VISION_ONLY = ("visual_pos_masks", "deepstack_visual_embeds")  # features added at vision tokens, deeper in


# -- the KV cache


class LastSlots(DynamicLayer):
    """One layer: ``update`` gives back what it is given, ``(B, H, N, D)``, and stores ``(B, H, K, D)``.

    Args:
        replayed: whether the layer may run again, to be recomputed in a backward pass; what it stored first
            stays.
    """

    def __init__(self, keep: int, replayed: bool = False) -> None:
        super().__init__()
        self.keep, self.replayed = keep, replayed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized and self.replayed:
            return key_states, value_states
        if self.is_initialized:
            raise RuntimeError("stage 1 runs a block in one forward; this layer was given keys twice.")
        self.lazy_initialization(key_states, value_states)
        self.keys = key_states[..., -self.keep :, :].clone()
        self.values = value_states[..., -self.keep :, :].clone()
        return key_states, value_states


class LastSlotsCache(VoCoKVCache):
    """Layers of :class:`LastSlots`, made as the model asks for them."""

    def __init__(self, keep: int, replayed: bool = False) -> None:
        super().__init__()
        self.keep, self.replayed = keep, replayed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(LastSlots(self.keep, self.replayed))
        layer: Any = self.layers[layer_idx]
        return layer.update(key_states, value_states, *args, **kwargs)


# -- the last layer


class NotCut(Exception):
    """A layer's input cannot be cut; the message says which."""


@dataclass
class LastRows:
    """One compression's plan.

    Attributes:
        layer: the last decoder layer.
        feed_forward: the feed-forward block of the layer before it, or ``None``.
        keep: K.
        length: N.
        cut: whether the last layer was cut, and ``reason`` why not.
    """

    layer: torch.nn.Module
    feed_forward: torch.nn.Module | None
    keep: int
    length: int
    cut: bool = False
    reason: str | None = None
    running: list[torch.nn.Module] = field(default_factory=list)


_LOCK = threading.Lock()
_USERS: dict[int, list] = {}  # id of a hooked module → [compressions that run, its hooks]


def plan_last_rows(
    text_model: torch.nn.Module, keep: int, length: int, feed_forward: bool = True
) -> LastRows | None:
    """How the last layer of ``text_model`` is cut to ``keep`` of ``length`` rows and, with ``feed_forward``,
    the feed-forward block of the layer before; ``None`` where there is no layer to cut.
    """
    layers = getattr(text_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not len(layers) or keep >= length:
        return None
    if getattr(getattr(text_model, "config", None), "num_kv_shared_layers", 0):
        _log.debug("last layer not cut: layers share keys and values")
        return None
    before = getattr(layers[-2], "mlp", None) if len(layers) > 1 and feed_forward else None
    return LastRows(layers[-1], before if isinstance(before, torch.nn.Module) else None, keep, length)


@contextlib.contextmanager
def last_rows(plan: LastRows | None) -> Iterator[None]:
    """Inside the block, a forward whose mode has ``cut=plan`` is cut as the plan says; the plan says
    afterwards whether it was.
    """
    modules = [] if plan is None else [m for m in (plan.layer, plan.feed_forward) if m is not None]
    hooked = []
    try:
        for module in modules:
            _hook(module)
            hooked.append(module)
        yield
    finally:
        for module in hooked:
            _unhook(module)
    if plan is not None and plan.reason:
        _log.debug("last layer not cut: %s", plan.reason)


def _hook(module: torch.nn.Module) -> None:
    with _LOCK:
        entry = _USERS.setdefault(id(module), [0, []])
        entry[0] += 1
        if entry[0] == 1:
            entry[1] = [
                module.register_forward_pre_hook(_before, with_kwargs=True),
                module.register_forward_hook(_after, with_kwargs=True),
            ]


def _unhook(module: torch.nn.Module) -> None:
    with _LOCK:
        entry = _USERS.get(id(module))
        if entry is None:
            return
        entry[0] -= 1
        if entry[0] <= 0:
            for handle in entry[1]:
                handle.remove()
            del _USERS[id(module)]


def _plan_in_force() -> LastRows | None:
    running = running_forward()
    return None if running is None else running.mode.cut


def _before(module: torch.nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    plan = _plan_in_force()
    if plan is None or kwargs is None:  # another thread's forward (kwargs are gone if the hooks just went)
        return None
    try:
        if module is plan.layer:
            made = _cut_layer(module, args, kwargs, plan)
            plan.cut = True
        elif module is plan.feed_forward:
            made = _cut_tokens(args, kwargs, plan)
        else:
            return None
    except NotCut as problem:
        if module is plan.layer:
            plan.reason = str(problem)
        return None
    plan.running.append(module)
    return made


def _after(module: torch.nn.Module, args: tuple, *rest: Any) -> Any:
    plan = _plan_in_force()
    if plan is None or module not in plan.running:
        return None
    plan.running.remove(module)
    output = rest[-1]
    if isinstance(output, tuple):
        return (_whole(output[0], plan), *output[1:])
    return _whole(output, plan)


def _whole(short: torch.Tensor, plan: LastRows) -> torch.Tensor:
    """``(B, K, H)`` → ``(B, N, H)``, zeros in front."""
    whole = short.new_zeros(short.shape[0], plan.length, *short.shape[2:])
    whole[:, -plan.keep :] = short
    return whole


def _cut_tokens(args: tuple, kwargs: dict, plan: LastRows) -> tuple[tuple, dict]:
    """A feed-forward block that is given one ``(B, N, H)``."""
    if kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
        raise NotCut("the feed-forward block is given more than hidden states")
    return (rows_of(args[0], 1, "hidden states", plan),), {}


def _cut_layer(module: torch.nn.Module, args: tuple, kwargs: dict, plan: LastRows) -> tuple[tuple, dict]:
    names = list(inspect.signature(module.forward).parameters)
    if len(args) > len(names):
        raise NotCut("its arguments have no names")
    new_args = tuple(cut_argument(name, value, plan) for name, value in zip(names, args, strict=False))
    return new_args, {name: cut_argument(name, value, plan) for name, value in kwargs.items()}


def rows_of(tensor: torch.Tensor, dim: int, name: str, plan: LastRows) -> torch.Tensor:
    if tensor.shape[dim] != plan.length:
        raise NotCut(f"{name} has the shape {tuple(tensor.shape)}")
    return tensor.narrow(dim, plan.length - plan.keep, plan.keep).contiguous()


def cut_argument(name: str, value: Any, plan: LastRows) -> Any:
    """One argument of the layer, for its last rows."""
    if name.startswith("position_embeddings"):
        if isinstance(value, (tuple, list)):
            return type(value)(cut_argument(name, part, plan) for part in value)
        if isinstance(value, dict):
            return {key: cut_argument(name, part, plan) for key, part in value.items()}
        return value if value is None else rows_of(value, value.dim() - 2, name, plan)
    if name == "attention_mask" and value is not None and type(value) is not torch.Tensor:
        return None  # a backend's own mask; what it would mask is thrown away
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (tuple, list, dict)) and len(value) and name not in _UNSHARED:
            raise NotCut(f"{name} is a {type(value).__name__}")
        return value
    if name == "hidden_states":
        if value.dim() != 3:
            raise NotCut(f"{name} has the shape {tuple(value.shape)}")
        return rows_of(value, 1, name, plan)
    if name == "per_layer_input" and value.dim() == 3:
        return rows_of(value, 1, name, plan)
    if name in _ALONG_LAST or (name in _TOKEN_TYPES and value.dim() == 2):
        return rows_of(value, value.dim() - 1, name, plan)
    if name == "attention_mask" and value.dim() in (2, 4):
        cut = rows_of(value, value.dim() - 1, name, plan)
        return cut if value.dim() == 2 else rows_of(cut, 2, name, plan)
    raise NotCut(f"{name} is not known")


# -- the whole decoder


@contextlib.contextmanager
def voco_rows_only(text_model: torch.nn.Module, keep: int, length: int) -> Iterator[LastRows]:
    """Inside the block, a forward whose mode has the plan given runs ``text_model`` over the last ``keep`` of
    ``length`` rows of its merged embeddings, once the compressor's own are in. What it returns nobody reads.

    Raises:
        NotCut: it was not handed embeddings, or something beside them that cannot be cut; the caller then
        runs
            the whole block.
    """
    plan = LastRows(text_model, None, keep, length)

    def cut(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if _plan_in_force() is not plan:
            return None
        if args or kwargs.get("inputs_embeds") is None:
            raise NotCut("the decoder is not handed embeddings by name")
        plan.cut = True
        return args, {name: _cut_for_decoder(name, value, plan) for name, value in kwargs.items()}

    handle = text_model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield plan
    finally:
        handle.remove()
    if not plan.cut:
        raise NotCut("the decoder did not run")


def _cut_for_decoder(name: str, value: Any, plan: LastRows) -> Any:
    if name in _VISION_ONLY:
        return None
    if name == "inputs_embeds":
        return rows_of(value, 1, name, plan)
    if name == "attention_mask" and isinstance(value, dict):
        return {kind: cut_argument(name, mask, plan) for kind, mask in value.items()}
    return cut_argument(name, value, plan)
