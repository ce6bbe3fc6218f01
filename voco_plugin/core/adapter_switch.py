"""Stage 1 with the weights that training started from: the model's adapter off, for one thread.

    compress   [V C]   base weights                     what the store's blocks are made by
    read       text    base weights + adapter           what trained (``stage1: frozen``)

PEFT's own switch is one flag a layer: a thread that answers while another compresses would answer without the
adapter. Here a layer asks which stage its own thread runs; the layers are as they were when no stage 1 runs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

_RUNS: ContextVar[bool] = ContextVar("voco_starting_weights", default=False)
_LOCK = threading.Lock()
_USERS: dict[int, list] = {}  # id of a layer → [stages that run, its own instance's forward]


@functools.cache
def is_tuner(kind: type) -> bool:
    """Whether modules of this class are PEFT layers, whose adapters can be switched (a transformers model has
    methods so named).
    """
    return isinstance(getattr(kind, "disable_adapters", None), property)


def on_starting_weights() -> bool:
    """Whether this thread is inside :func:`starting_weights`."""
    return _RUNS.get()


@contextlib.contextmanager
def starting_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block, forwards of this thread run without the model's adapters.

    Raises:
        ValueError: there is no adapter to leave out, it is merged into the weights, or it holds whole modules
            or rows, which stage 1 would have read as they were.
    """
    layers = _layers(model)
    token = _RUNS.set(True)
    try:
        for layer in layers:
            _open(layer)
        yield
    finally:
        for layer in layers:
            _shut(layer)
        _RUNS.reset(token)


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = [module for module in model.modules() if is_tuner(type(module))]
    what = "this model's stage 1 is frozen (frozen_stage1): it compresses without its adapter, and"
    if not layers:
        raise ValueError(
            f"{what} it has none (it was merged, or not loaded); load the checkpoint folder with "
            "voco_plugin.load, or the starting model alone without frozen_stage1."
        )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(f"{what} the adapter is merged into its weights; call unmerge_adapter() first.")
    odd = next((layer for layer in layers if not hasattr(layer, "base_layer")), None)
    if odd is not None:
        raise ValueError(f"{what} a {type(odd).__name__} holds whole modules or rows; train LoRA alone.")
    return layers


def _open(layer: nn.Module) -> None:
    with _LOCK:
        entry = _USERS.setdefault(id(layer), [0, None])
        entry[0] += 1
        if entry[0] == 1:
            entry[1] = vars(layer).get("forward")
            layer.forward = _ByStage(layer, layer.forward)


def _shut(layer: nn.Module) -> None:
    with _LOCK:
        entry = _USERS.get(id(layer))
        if entry is None:
            return
        entry[0] -= 1
        if entry[0]:
            return
        del _USERS[id(layer)]
        if entry[1] is None:
            vars(layer).pop("forward", None)
        else:
            layer.forward = entry[1]


class _ByStage:
    """``layer.forward``, or its base layer's where this thread runs stage 1."""

    def __init__(self, layer: nn.Module, own: Any) -> None:
        self.layer, self.own = layer, own

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not _RUNS.get():
            return self.own(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)  # PEFT's, which names the adapter of each row
        return self.layer.base_layer(x, *args, **kwargs)


__all__ = ["is_tuner", "on_starting_weights", "starting_weights"]
