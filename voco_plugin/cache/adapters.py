"""Which adapters of a model take part in what it computes. One that is loaded and not active, or switched
off, takes none: a model with it is the model without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.adapter_stages import COMPRESS, READ
from ..core.model_parts import LANGUAGE, ModelParts
from ..core.peft_layers import is_tuner

WHOLE_MODULES = "modules_to_save"
"""PEFT's holder of modules that an adapter replaces: weights like the model's own."""
_WRAPPERS = ("base_layer", "original_module", "token_adapter")
_MARKS = ("lora_", "trainable_tokens_", "ia3_", "oft_", "vera_")


@dataclass(frozen=True)
class Tuner:
    """A PEFT layer of a model, with the adapters of it that compute, in their order."""

    name: str
    layer: Any
    active: tuple[str, ...]

    @property
    def called(self) -> list[str]:
        """The active adapters as a hash calls them, which does not tell their own names."""
        return [f"adapter{number}" if number else "default" for number in range(len(self.active))]

    @property
    def holders(self) -> dict[str, set[str]]:
        """The layer's modules that hold something for each adapter, and for which."""
        parts = self.layer.named_children()
        return {name: set(part.keys()) for name, part in parts if hasattr(part, "keys")}


def tuners_of(model: nn.Module) -> list[Tuner]:
    """The PEFT layers of ``model``; ``active`` is empty in those that only hold adapters."""
    found = []
    for name, layer in model.named_modules():
        if is_tuner(layer.__class__):
            on = () if layer.disable_adapters else tuple(layer.active_adapters)
            # of a wrapper of rows, which holds the adapters; not by getattr, which peft 0.18 sends on to an
            # active adapter, and an idle layer has none
            inner = layer._modules.get("token_adapter", layer)
            here: set[str] = set().union(*Tuner(name, inner, on).holders.values())
            if set(on) == {COMPRESS, READ}:  # of which each does the same in whichever order they are named
                on = (COMPRESS, READ)
            found.append(Tuner(name, layer, tuple(adapter for adapter in on if adapter in here)))
    return found


def reader_weights(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, bool]]:
    """The weights that the base of ``model`` reads text with, adapters left out: the name that each has in
    the base alone, its name here, the weight, and whether its rows are the vocabulary's.
    """
    parts = ModelParts(model)  # type: ignore[arg-type]
    ends = [parts.head, *(n for n, m in model.named_modules() if m is model.get_input_embeddings())]  # type: ignore
    for name, weight in model.named_parameters():
        pieces = name.split(".")
        if parts.of(name) != LANGUAGE or any(p.startswith(_MARKS) or p == WHOLE_MODULES for p in pieces):
            continue
        inside = any(end is not None and name.startswith(end + ".") for end in ends)
        called = ".".join(piece for piece in pieces if piece not in _WRAPPERS)
        yield called, name, weight, inside and weight.dim() == 2


class Names:
    """Names of weights as a hash takes them: those of idle adapters are left out, an active adapter's do not
    tell what it is called, and a module that only idle adapters wrap is called as it was without them.
    """

    def __init__(self, tuners: list[Tuner]) -> None:
        self._called: dict[str, str | None] = {}
        self._adapters: set[str] = set()
        self._unwrapped: dict[str, str] = {}
        for tuner in tuners:
            active = dict(zip(tuner.active, tuner.called, strict=True))
            for holder, adapters in tuner.holders.items():
                place = f"{tuner.name}.{holder}."
                for adapter in adapters:
                    self._called[place + adapter] = place + active[adapter] if adapter in active else None
                if holder != WHOLE_MODULES:
                    self._adapters |= {place + adapter for adapter in adapters}
            if not tuner.active:
                for inner in ("original_module", "token_adapter"):
                    self._unwrapped[f"{tuner.name}.{inner}"] = tuner.name

    def __call__(self, name: str) -> tuple[str | None, bool]:
        """``name`` in the hash, ``None`` where it takes no part; and whether it is an adapter's."""
        whole = name
        for prefix in _prefixes(name):
            if prefix in self._called:
                renamed = self._called[prefix]
                adapter = prefix in self._adapters
                return (None if renamed is None else renamed + whole[len(prefix) :]), adapter
        for prefix in _prefixes(name):
            if prefix in self._unwrapped:
                name = self._unwrapped[prefix] + name[len(prefix) :]
        return name.replace(".base_layer", ""), any(p.startswith(_MARKS) for p in name.split("."))


def _prefixes(name: str) -> list[str]:
    """The names of what holds ``name``, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
