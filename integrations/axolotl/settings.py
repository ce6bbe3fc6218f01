"""The rule that axolotl's YAML asks for, and which of its keys are refused.

``cfg`` is axolotl's config: a mapping whose ``get`` gives ``None`` for what is not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from voco_plugin.integrations.trainer_rule import rule_for

import voco_plugin as vp
from voco_plugin.config import read_section
from voco_plugin.training.chat_templates import checked_template, training_template

_ROW = "conversations share a row there, which VoCo tokens cannot be put into"
_CUT = "a row would be cut up, and its blocks with it"
_LABELS = "answers are learnt as the chat template marks them, and nothing else is"
_SFT = "only SFT was compared with VoCoSFTTrainer"
_SHARDS = "axolotl saves such models in ways that were not tried; voco train does this (docs/distributed.md)"
_KERNEL = "it was not compared with VoCoSFTTrainer"

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

# key → the values that are fine, and why others are not; not set is fine
_FINE: dict[str, tuple[tuple[Any, ...], str]] = {
    "sample_packing": ((False,), _ROW),
    "eval_sample_packing": ((False,), _ROW),
    "pad_to_sequence_len": ((False,), "rows are padded to the longest of their batch"),
    "train_on_inputs": ((False,), _LABELS),
    "role_boundaries": (([],), _LABELS),
    "rl": ((), _SFT),
    "reward_model": ((False,), _SFT),
    "process_reward_model": ((False,), _SFT),
    "pretraining_dataset": ((), _SFT),
    "context_parallel_size": ((1,), _CUT),
    "tensor_parallel_size": ((1,), _CUT),
    "fsdp": (([],), _SHARDS),
    "fsdp_config": (({},), _SHARDS),
    "deepspeed": ((), _SHARDS),
    "adapter": (("lora", "qlora"), "it was not compared with VoCoSFTTrainer; use lora, or none"),
    "relora": ((False,), _KERNEL),
    **{key: ((False,), _KERNEL) for key in KERNELS},
    "torch_compile": ((False,), _KERNEL),
    "shrink_embeddings": ((False,), "it would take the VoCo token's row away"),
}
_DATASET = {
    "roles_to_train": ((["assistant"],), _LABELS),
    "train_on_eos": (("turn",), _LABELS),
}
_PLUGINS = (
    "liger",
    "cut_cross_entropy",
    "kernels",
    "kd",
    "diffusion",
    "densemixer",
    "expert_parallel",
    "mora",
)
_OWN = (None, "tokenizer_default", "jinja")


def check_settings(cfg: Mapping[str, Any]) -> None:
    """Refuse what makes other batches, or another loss, than ``VoCoSFTTrainer``'s.

    Raises:
        ValueError: by name, with the reason.
    """
    for key, (fine, why) in _FINE.items():
        _check(key, cfg.get(key), fine, why)
    for dataset in cfg.get("datasets") or []:
        for key, (fine, why) in _DATASET.items():
            _check(f"datasets: {key}", dataset.get(key), fine, why)
    if not cfg.get("skip_prepare_dataset"):
        raise ValueError(
            "skip_prepare_dataset must be true under VoCo: rows are otherwise tokenized before, without "
            "their images (set remove_unused_columns: false too, as for axolotl's own vision models)."
        )
    if not cfg.get("processor_type"):
        raise ValueError(
            "processor_type must be set under VoCo, as for axolotl's own vision models: AutoProcessor."
        )
    name = cfg.get("chat_template")
    name = getattr(name, "value", name)
    if name not in _OWN:
        raise ValueError(
            f"chat_template: {name} is refused under VoCo: axolotl's own templates do not mark answers, "
            "and it looks for them by tokens that it knows, so that other tokens are learnt than "
            "VoCoSFTTrainer learns; leave it out for the processor's template, or set voco_chat_template."
        )
    for plugin in cfg.get("plugins") or []:
        parts = str(plugin).split(".")
        if parts[0] == "axolotl" and set(parts) & set(_PLUGINS):
            raise ValueError(f"plugins: {plugin} is refused under VoCo: {_KERNEL}; leave it out.")


def _check(key: str, value: Any, fine: tuple[Any, ...], why: str) -> None:
    value = getattr(value, "value", value)
    if value is None or value in fine or (not value and not isinstance(value, bool)):
        return
    raise ValueError(f"{key}: {value} is refused under VoCo: {why}; leave it out.")


def config_for(cfg: Mapping[str, Any]) -> vp.VoCoConfig:
    """The rule in force; see :func:`~voco_plugin.integrations.trainer_rule.rule_for`."""
    asked = cfg.get("voco")
    asked = read_section(None if asked is None else dict(asked), vp.VoCoConfig, "voco", '{"num_tokens": 2}')
    return rule_for(str(cfg.get("base_model")), asked, "axolotl")


def chat_template(cfg: Mapping[str, Any], processor: Any) -> str:
    """The text of the chat template to train with: ``voco_chat_template``, ``chat_template_jinja``, or the
    processor's own.

    Raises:
        ValueError: it does not mark the answers.
    """
    name, text = cfg.get("voco_chat_template"), cfg.get("chat_template_jinja")
    if name is None and text:
        return checked_template(text, "chat_template_jinja")
    return training_template(processor, name)
