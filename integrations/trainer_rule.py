"""What the plug-ins of other trainers share: the rule they are asked for, and whether it is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import voco_plugin as vp
from voco_plugin.config import CONFIG_NAME

_UNMEASURED = {"compressor": "voco", "adapter_stages": "both", "frozen_stage1": False}


def check_rule(config: vp.VoCoConfig, trainer: str) -> None:
    """
    Raises:
        ValueError: a field asks for what only ``VoCoSFTTrainer`` does.
    """
    for name, wanted in _UNMEASURED.items():
        value = getattr(config, name)
        if value != wanted:
            raise ValueError(
                f"voco.{name}={value!r} is trained by VoCoSFTTrainer alone (voco train); under {trainer} "
                "leave it out."
            )


def rule_for(model: str, asked: vp.VoCoConfig | None, trainer: str) -> vp.VoCoConfig:
    """The rule for the model in the folder ``model``: what is asked, what was saved with it, or the default.

    Raises:
        ValueError: it was saved with another rule than is asked, or with one that is not trained here.
    """
    if asked is not None:
        check_rule(asked, trainer)
    if not (Path(model) / CONFIG_NAME).is_file():
        return vp.VoCoConfig() if asked is None else asked
    saved, _ = vp.VoCoConfig.load(model)
    check_rule(saved, trainer)
    if asked is not None:
        was, now = saved.to_dict(), asked.to_dict()
        now["token_id"] = was["token_id"] if now["token_id"] is None else now["token_id"]
        different = [f"{key}={now[key]!r} (saved: {was[key]!r})" for key in was if was[key] != now[key]]
        if different:
            raise ValueError(
                f"{trainer}'s arguments ask for voco with {', '.join(different)}, and the model in {model} "
                "was saved with its own; leave voco out, or start from a model without it."
            )
    return saved


def check_row_trains(model: Any, fix: str) -> None:
    """
    Args:
        fix: what to do about it, in the trainer's words.

    Raises:
        ValueError: the embeddings are frozen, and no adapter holds the VoCo token's row.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not any(parameter.requires_grad for parameter in inner.get_input_embeddings().parameters()):
        raise ValueError(f"the VoCo token's row is frozen, so that nothing learns to compress; {fix}.")
