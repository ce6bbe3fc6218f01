"""The state of a model that something was computed for, and whether it is still that."""

from __future__ import annotations

import itertools
import operator
import weakref
from typing import Any

import torch

from ..core.peft_layers import is_tuner
from .offload import in_memory
from .witness import Witness


class Seen:
    """``model`` as it is now; weak references and addresses: it keeps no weight in memory.

    It is asked for every prompt, in front of the first token: no names are built, and nothing is computed
    but lists of what is there and a few values of each weight, compared with what was. 7B's 700 weights take
    half a millisecond (``python benchmarks/witness.py``).
    """

    def __init__(self, model: torch.nn.Module | None = None, voco_id: int = -1) -> None:
        modules = [] if model is None else list(model.modules())
        self.modules = [weakref.ref(module) for module in modules]
        tensors = _tensors(modules)
        self.tensors = [None if tensor is None else weakref.ref(tensor) for tensor in tensors]
        self.found = None if model is None else _found(modules, tensors)
        self.witness = None if model is None else Witness(_read(model, voco_id, tensors))
        self.voco_id = voco_id

    def __reduce__(self) -> tuple:
        return Seen, ()  # a copied or unpickled model computes its own

    def still(self, model: torch.nn.Module, voco_id: int) -> bool:
        """Whether ``model`` is as it was: the same modules, in them the same tensors, with the values that
        they had.
        """
        modules = [ref() for ref in self.modules]
        if voco_id != self.voco_id or not modules or modules[0] is not model or None in modules:
            return False
        tensors = _tensors(modules)
        known = [None if ref is None else ref() for ref in self.tensors]
        return (
            self.witness is not None
            and len(known) == len(tensors)
            and all(map(operator.is_, known, tensors))
            and _found(modules, tensors) == self.found
            and self.witness.same(_read(model, voco_id, tensors))
        )


def _tensors(modules: list[Any]) -> list[torch.Tensor | None]:
    """The parameters and buffers of ``modules``. Those that a forward computes are among them: they change
    rarely, and then a hash is computed once too often.
    """
    held = [part.values() for module in modules for part in (module._parameters, module._buffers) if part]
    if any("_hf_hook" in vars(module) for module in modules):
        held = [part for module in modules for part in _offloaded(module)]
    return [*itertools.chain.from_iterable(held)]


def _offloaded(module: Any) -> tuple[Any, Any]:
    """A module's weights and buffers, wherever accelerate keeps them; it holds others after each forward."""
    kept = in_memory(module)
    return module._parameters.values() if kept is None else kept, module._buffers.values()


def _found(modules: list[Any], tensors: list[torch.Tensor | None]) -> tuple[list, ...]:
    """What tells a state from another: the tree, what was written to, and which adapters are on."""
    children = itertools.chain.from_iterable([module._modules.values() for module in modules])
    tuners = [module for module in modules if is_tuner(module.__class__)]
    return (
        [*map(id, children)],
        [None if t is None else (0 if t.is_inference() else t._version, t.dtype) for t in tensors],
        [
            (tuple(layer.active_adapters), layer.disable_adapters, [*vars(layer).get("scaling", {}).items()])
            for layer in tuners
        ],
    )


def _read(model: Any, voco_id: int, tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """What the witness reads: all tensors, and the VoCo token's row of the embeddings, which is small in a
    large one.
    """
    held = [tensor for tensor in tensors if tensor is not None]
    embedding = model.get_input_embeddings()
    while embedding is not None and "weight" not in embedding._parameters:
        inner = embedding._modules
        embedding = inner.get("base_layer") or inner.get("original_module") or inner.get("token_adapter")
    weight = None if embedding is None else embedding._parameters["weight"]
    if weight is not None and weight.dim() == 2 and voco_id < weight.shape[0]:
        held.append(weight.detach()[voco_id])
    return held
