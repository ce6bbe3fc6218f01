"""``voco.adapter_stages`` in training: what may train where LoRA acts on some tokens only."""

from __future__ import annotations

from typing import Any

from ..config import VoCoConfig
from ..core.adapter_stages import BOTH, act_by_stage, check_configs
from ..core.attachment import attachment
from .parts import is_peft


def check_stages(voco: VoCoConfig | None, model: Any, peft_config: Any, args: Any) -> None:
    """Before training's own adapter is made: refuse what cannot act by stage.

    Args:
        voco: the rule in force; ``None`` for a plain VLM.
        model: maybe a ``PeftModel``.

    Raises:
        ValueError: full fine-tuning, another method than LoRA, or ``stage1: frozen``.
    """
    if voco is None or voco.adapter_stages == BOTH:
        return
    what = f"voco.adapter_stages={voco.adapter_stages!r}"
    if getattr(args, "stage1", "joint") == "frozen":
        raise ValueError(
            f"{what} compresses with an adapter, and stage1='frozen' without; leave one of them out."
        )
    wrapped = is_peft(model)
    if peft_config is None and not wrapped:
        raise ValueError(
            f"{what} says which tokens an adapter acts on, and there is none: the weights themselves would "
            "train, which read text too; set use_peft: true (peft_config), or leave adapter_stages out."
        )
    configs = list(model.peft_config.values()) if wrapped else [peft_config]
    for config in configs:
        method = getattr(config.peft_type, "value", config.peft_type)
        if method != "LORA":
            raise ValueError(f"{what} runs LoRA token by token, not {method}; use LoRA.")
        if getattr(config, "use_dora", False):
            raise ValueError(f"{what} runs plain LoRA token by token, not DoRA; leave use_dora out.")
    check_configs(configs, voco.adapter_stages)


def run_by_stage(model: Any, voco: VoCoConfig) -> None:
    """Once the model is wrapped in PEFT: let its adapters act by stage.

    Args:
        model: the attached model inside PEFT.

    Raises:
        ValueError: an adapter does what cannot be told apart token by token.
    """
    if voco.adapter_stages != BOTH:
        act_by_stage(model, voco.adapter_stages, attachment(model).vocab.voco_id)


__all__ = ["check_stages", "run_by_stage"]
