"""What may train where stage 1 is frozen (``stage1: frozen``): LoRA in the language model, and nothing else.

A checkpoint holds the adapter and names its base; stage 1 is that base. Whatever else trained, be it whole
weights, a token's row or the projector, stage 1 at inference would not have what it was trained with.
"""

from __future__ import annotations

from typing import Any

from ...config import VoCoConfig
from ...core.peft_layers import what_changed_the_base
from ..model_setup import is_peft
from ..parts import LANGUAGE, ModelParts

_BASE = "merge it (merge_and_unload, save_pretrained) and start a new adapter on the merged folder"


def check_frozen(model: Any, voco: VoCoConfig | None, stage1: str, peft_config: Any) -> None:
    """Before training's own adapter is made: refuse a start whose stage 1 cannot be told from its adapter.

    Args:
        model: attached, maybe a ``PeftModel``.
        voco: the rule it is attached with.

    Raises:
        ValueError: the message says what to do.
    """
    frozen = voco is not None and voco.frozen_stage1
    if stage1 != "frozen":
        if frozen:
            raise ValueError(
                f"stage1={stage1!r}: the stage 1 of this model is frozen (voco.frozen_stage1), and only "
                "stage1=frozen trains on from it; set that, or start from its base model."
            )
        return
    if getattr(model, "quantization_method", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            "stage1='frozen' cannot go with quantized weights: blocks would be those of other weights than "
            "the starting model's; load it in bfloat16."
        )
    if not is_peft(model):
        if peft_config is None:
            raise ValueError(
                "stage1='frozen' needs an adapter (use_peft: true): stage 1 is the weights training starts "
                "from, also at inference, and a checkpoint of full tuning would lack them."
            )
        _check_init([peft_config], "set init_lora_weights=True")
        method = getattr(peft_config.peft_type, "value", peft_config.peft_type)
        if method != "LORA":
            raise ValueError(f"stage1='frozen' trains LoRA, not {method}; use LoRA, or stage1=streamed.")
        return
    if peft_config is not None:
        raise ValueError(
            "stage1='frozen': the model given has an adapter, and a new one is asked for; leave use_peft "
            f"(peft_config) out to train that one on, or {_BASE}."
        )
    _check_init(model.peft_config, _BASE)
    if not frozen and any(p.any() for name, p in model.named_parameters() if ".lora_B." in name):
        raise ValueError(
            "stage1='frozen': the adapter given was trained with stage 1, which runs without it from here "
            f"on; {_BASE}."
        )


def _check_init(configs: Any, way_out: str) -> None:
    changed = what_changed_the_base(configs)
    if changed is not None and not changed.startswith("bias"):  # which trains, and is named by check_trained
        raise ValueError(
            f"stage1='frozen': {changed} changes the weights that the adapter stands on, so stage 1 would "
            f"not be the starting model; {way_out}."
        )


def check_trained(student: Any) -> None:
    """Refuse what trains beside LoRA weights of the language model.

    Raises:
        ValueError: it names the weight.
    """
    parts = ModelParts(student)
    for name, parameter in student.named_parameters():
        lora = any(part.startswith("lora_") for part in name.split("."))
        if parameter.requires_grad and not (lora and parts.of(name) == LANGUAGE):
            raise ValueError(
                f"stage1='frozen': {name} would train, and stage 1 stays as it is; only LoRA weights of the "
                "language model may (no modules_to_save, trained token rows, biases or vision layers)."
            )


__all__ = ["check_frozen", "check_trained"]
