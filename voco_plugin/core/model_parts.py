"""Which part of a vision-language model a parameter or module belongs to, by its module tree."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from torch import nn

from .block_embeddings import NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LANGUAGE, PROJECTOR, VISION = "language model", "projector", "vision tower"
COMPRESSOR = "compressor"
FIXED = "fixed layers"

_PROJECTOR = re.compile(
    r"projector|_projection$|connector|merger|aligner|resampler|q_?former|multi_?modal|embed_vision|newline|img_projection|visual_embeddings_table|^mlp1$"
)
_OTHER_SENSE = re.compile(r"vision|visual|image|audio|speech|video")


class ModelParts:
    """The parts of ``model``, a transformers model outside PEFT and other wrappers.

    The language model is the module that holds the input embeddings, and its head. Of the rest, what is named
    like a projector is one, and everything else is the vision tower.

    Attributes:
        decoder: name of the module that holds the input embeddings.
        layers: name of its list of layers.
        fixed: names of the layers that a composed model keeps as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        whole = cast("PreTrainedModel", model)  # what `unwrap` gives is typed as any module
        self.decoder = names[id(whole.get_input_embeddings())].rpartition(".")[0]
        self.head = names.get(id(whole.get_output_embeddings()))
        composed = getattr(getattr(model, "config", None), "composed_of", None) or {}
        self.fixed = tuple(composed.get("fixed_layers") or ())
        lists = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and self.of(name) == LANGUAGE
        ]
        self.layers = min(lists, key=lambda name: (name.count("."), name), default=self.decoder)

    def of(self, name: str) -> str:
        """The part of the parameter or module called ``name``."""
        if any(f".{layer}." in f".{name}." for layer in self.fixed):
            return FIXED
        if _within(name, NAME):
            return COMPRESSOR
        if self.head is not None and _within(name, self.head):
            return LANGUAGE
        if _within(name, self.decoder):
            # Phi-4's decoder holds its image and audio encoders, one level down
            inner = ".".join(name[len(self.decoder) :].lstrip(".").split(".")[:2])
            if not _OTHER_SENSE.search(inner):
                return LANGUAGE
        return PROJECTOR if any(_PROJECTOR.search(part) for part in name.split(".")) else VISION

    def roots(self, model: nn.Module, part: str) -> list[str]:
        """The topmost modules that belong to ``part`` and hold parameters of no other."""
        found: list[str] = []
        for name, module in model.named_modules():
            if name and self.of(name) == part and not any(_within(name, root) for root in found):
                parts = {self.of(f"{name}.{inner}") for inner, _ in module.named_parameters()}
                if parts == {part}:
                    found.append(name)
        return found

    def wrappable(self, model: nn.Module, part: str) -> list[str]:
        """:meth:`roots`, lists and dicts of modules taken apart: what PEFT's ``modules_to_save`` takes."""
        containers = (nn.ModuleList, nn.ModuleDict)
        modules = dict(model.named_modules())
        found: list[str] = []
        todo = self.roots(model, part)
        while todo:
            name = todo.pop(0)
            if isinstance(modules[name], containers):
                todo = [f"{name}.{inner}" for inner, _ in modules[name].named_children()] + todo
            else:
                found.append(name)
        return found

    def loose(self, model: nn.Module, part: str) -> list[str]:
        """Parameters of ``part`` that stand in no module of their own (LLaVA-NeXT's ``image_newline``)."""
        roots = self.roots(model, part)
        return [
            name
            for name, _ in model.named_parameters()
            if self.of(name) == part and not any(_within(name, root) for root in roots)
        ]


def _within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


__all__ = ["COMPRESSOR", "FIXED", "LANGUAGE", "PROJECTOR", "VISION", "ModelParts"]
