"""What trains of which part of a vision-language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ..core.model_parts import COMPRESSOR, FIXED, LANGUAGE, PROJECTOR, VISION, ModelParts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from typing_extensions import TypeIs

VIRTUAL = "virtual tokens"
TOKEN_ROW, ADAPTERS = "VoCo token row", "adapters"


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


def still_modules(model: PreTrainedModel | PeftModel) -> list[Any]:
    """What does not train outside the language model (vision tower, projector): whole subtrees, as few as
    there are.

    In training mode a frozen batch normalization computes with the batch's statistics and moves its own,
    which no adapter's checkpoint holds: the model would train on other features than it answers from (a
    convolutional tower's were half as large off). So they stay in evaluation mode, dropout with them.
    """
    base = base_of(model)
    parts, found = ModelParts(base), []

    def visit(module: Any, name: str) -> None:
        tensors = list(module.named_parameters())
        if not tensors:
            return
        of = {parts.of(f"{name}{key}") for key, _ in tensors}
        if not of & {LANGUAGE, COMPRESSOR} and not any(tensor.requires_grad for _, tensor in tensors):
            found.append(module)
            return
        for key, child in module.named_children():
            visit(child, f"{name}{key}.")

    visit(base, "")
    return found


def keep_still(model: PreTrainedModel | PeftModel) -> None:
    """Keep :func:`still_modules` in evaluation mode under a trainer that is not ours, whenever it puts the
    model into training mode: by hooks that stay on it, and do nothing to what is thawed later.
    """
    for module in still_modules(model):
        module.register_forward_pre_hook(_evaluates_if_frozen)


def _evaluates_if_frozen(module: Any, given: Any) -> None:
    if module.training and not any(tensor.requires_grad for tensor in module.parameters()):
        module.eval()


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


__all__ = [
    "ADAPTERS",
    "COMPRESSOR",
    "FIXED",
    "LANGUAGE",
    "PROJECTOR",
    "TOKEN_ROW",
    "VIRTUAL",
    "VISION",
    "ModelParts",
    "base_of",
    "count_trainable",
    "describe_trainable",
    "freeze",
    "is_peft",
    "is_token_row",
    "keep_still",
    "still_modules",
]
