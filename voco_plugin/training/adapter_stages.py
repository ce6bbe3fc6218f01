"""``voco.adapter_stages`` in training: what may train where LoRA acts on some tokens only."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

from ..config import VoCoConfig
from ..core.adapter_stages import BOTH, COMPRESS, READ, SEPARATE, act_by_stage, check_configs
from ..core.attachment import attachment
from ..models.two_adapters import activate_both, put_read
from .parts import LANGUAGE, ModelParts, is_peft


def check_adapter_stages(voco: VoCoConfig | None, model: Any, peft_config: Any, args: Any) -> None:
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
    if voco.adapter_stages == SEPARATE and not args.train_language:
        raise ValueError(
            f"{what} trains an adapter that reads text, and train_language is false; use 'compress'."
        )
    wrapped = is_peft(model)
    if wrapped and (set(model.peft_config) == {COMPRESS, READ}) != (voco.adapter_stages == SEPARATE):
        raise ValueError(
            f"{what}, and the PeftModel given holds {', '.join(model.peft_config)}; 'separate' trains the "
            f"adapters {COMPRESS} and {READ}, 'compress' a single one: give the model without adapters, and "
            "a peft_config."
        )
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


def with_two_adapters(model: Any, peft_config: Any, args: Any) -> Any:
    """``model`` in PEFT, with an adapter for images and one for text, both of which train.

    Args:
        peft_config: what :func:`~voco_plugin.training.adapters.prepare_peft_config` made of the user's. The
            VoCo token's row and whole modules, which no text sees, are held by ``compress`` alone.
    """
    from peft import get_peft_model
    from transformers import set_seed

    reading = copy.deepcopy(peft_config)
    reading.modules_to_save = reading.trainable_token_indices = None
    reading.target_modules = of_language(model, peft_config.target_modules)
    plugin = args.deepspeed_plugin
    cast = plugin is None or plugin.zero_stage != 3  # as TRL has it
    set_seed(args.seed)  # as TRL does before it makes an adapter
    wrapped = get_peft_model(model, peft_config, adapter_name=COMPRESS, autocast_adapter_dtype=cast)
    wrapped.add_adapter(READ, reading, autocast_adapter_dtype=cast)
    activate_both(wrapped, train=True)
    return wrapped


def of_language(model: Any, targets: Any) -> Any:
    """``target_modules`` without the layers of the vision tower."""
    parts = ModelParts(model)
    names = [name for name, module in model.named_modules() if parts.of(name) == LANGUAGE]
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [n for n in names if any(n == target or n.endswith(f".{target}") for target in targets)]


def load_adapters(model: Any, folder: str | os.PathLike | None) -> None:
    """Put the weights of both adapters of a checkpoint back into a ``PeftModel`` that trains."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device="cpu")
    set_peft_model_state_dict(model, weights, adapter_name=COMPRESS)
    put_read(model, load_peft_weights(os.path.join(str(folder), READ), device="cpu"))


def run_by_stage(model: Any, voco: VoCoConfig) -> None:
    """Once the model is wrapped in PEFT: let its adapters act by stage.

    Args:
        model: the attached model inside PEFT.

    Raises:
        ValueError: an adapter does what cannot be told apart token by token.
    """
    if voco.adapter_stages != BOTH:
        act_by_stage(model, voco.adapter_stages, attachment(model).vocab.voco_id)


__all__ = ["check_adapter_stages", "load_adapters", "run_by_stage", "with_two_adapters"]
