"""Which part of a vision-language model a parameter belongs to, by its module tree; what of it trains."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..core.block_embeddings import NAME

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from typing_extensions import TypeIs

LANGUAGE, PROJECTOR, VISION = "language model", "projector", "vision tower"
COMPRESSOR = "compressor"
VIRTUAL = "virtual tokens"
TOKEN_ROW, ADAPTERS = "VoCo token row", "adapters"
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


def is_token_row(name: str) -> bool:
    """Whether the parameter called ``name`` is PEFT's copy of the VoCo token's row."""
    return "trainable_tokens_" in name


def is_peft(model: Any) -> TypeIs[PeftModel]:
    """Whether ``model`` is a ``PeftModel``, and not a plain model (``add_adapter`` leaves it one)."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside PEFT, or ``model`` itself."""
    return cast("PreTrainedModel", model.get_base_model()) if is_peft(model) else model


def freeze(
    model: PreTrainedModel, *, language: bool, projector: bool, vision_tower: bool, compressor: bool = True
) -> None:
    """Full fine-tuning: each part trains only as asked.

    Compressor, projector and vision tower are switched both ways. What trains of the language model stays as
    it is where it is asked for: who froze some of its layers keeps them frozen.
    """
    parts = ModelParts(model)
    for name, parameter in model.named_parameters():
        part = parts.of(name)
        if not parameter.is_floating_point():
            continue
        if part == FIXED:  # the identity matrices of a composed model's `linear` projector
            parameter.requires_grad_(False)
        elif part != LANGUAGE:
            asked = {COMPRESSOR: compressor, PROJECTOR: projector}.get(part, vision_tower)
            parameter.requires_grad_(asked)
        elif not language:
            parameter.requires_grad_(False)


def count_trainable(model: PreTrainedModel | PeftModel, row_only: bool = False) -> tuple[dict[str, int], int]:
    """``({what trains: parameters}, all parameters)`` of a model, PEFT-wrapped or not.

    Args:
        row_only: of the input embeddings, only the VoCo token's row moves.
    """
    base = base_of(model)
    parts, total = ModelParts(base), 0
    counts: Counter[str] = Counter()
    loose = parts.loose(base, PROJECTOR) if base is not model else []
    rows = base.get_input_embeddings().get_parameter("weight") if row_only else None
    own = {id(parameter) for parameter in base.parameters()}
    for parameter in model.parameters():  # of PEFT's prompt learning, which stands outside the model
        if id(parameter) not in own:
            total += parameter.numel()
            counts[VIRTUAL] += parameter.numel() if parameter.requires_grad else 0
    for name, parameter in base.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 empties the tensors it shards
        total += size
        if parameter.requires_grad:
            if parameter is rows:
                counts[TOKEN_ROW] += parameter.shape[-1]
            elif is_token_row(name):
                counts[TOKEN_ROW] += size
            elif base is not model and "modules_to_save" not in name and name not in loose:
                counts[f"{ADAPTERS} in the {parts.of(name)}"] += size
            else:
                counts[parts.of(name)] += size
    return {name: count for name, count in counts.items() if count}, total


def describe_trainable(counts: Mapping[str, int], total: int) -> str:
    """One line: what trains, from what :func:`count_trainable` gives."""
    trained = sum(counts.values())
    what = ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "nothing"
    return f"training {what}: {trained:,} of {total:,} parameters ({trained / max(total, 1):.2%})"
