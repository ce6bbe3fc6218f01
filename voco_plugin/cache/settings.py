"""What computes besides weights: a model's config, and the numbers that its active adapters scale by.

Only what differs from the config class's own values is told, so that a field that a newer transformers adds
changes nothing. What cannot change a key or a value is left out: paths, versions, the dtype that the config
names (weights tell theirs), limits, dropout, losses, what generation reads.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from typing import Any

import torch
from transformers import PreTrainedConfig

from .adapters import Tuner

_IDLE = re.compile(
    r"_.*|.*(dropout|drop_path|layerdrop|pdrop).*|.*(loss|_coef|initializer|_init|_plan)|init(ializer)?_.*"
    r"|(bos|eos|pad|sep|decoder_start|forced_\w+)_token_id|(id2label|label2id|label_names|problem_type|num_labels)"
    r"|architectures|auto_map|transformers_version|name_or_path|model_type|tokenizer_class|vocab_size"
    r"|(torch_)?dtype|use_cache|use_return_dict|return_dict|output_\w+|gradient_checkpointing|torchscript"
    r"|tie_word_embeddings|chunk_size_feed_forward|cross_attention_hidden_size|attn_implementation"
    r"|experts_implementation|ignore_keys_at_rope_validation|distributed_config|finetuning_task|use_bfloat16"
    r"|task_specific_params|is_encoder_decoder|max_length|min_length|voco"
)
"""Names of config fields that change no key and no value."""
_GROWS = ("dynamic", "longrope", "yarn")
"""Kinds of rope that read how long a model's prompts may be."""
_LONG = 200  # characters; a list that is longer is told as a hash
_NO_WEIGHTS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
"""Numbers of a PEFT layer that its weights' shapes and ``scaling`` already say."""


class ConfigSettings:
    """``values`` = ``{"text_config.rms_norm_eps": 1e-5, …}``: what ``config`` sets that changes keys or
    values, as numbers and short texts.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.values = _of_config(config)
        try:
            self._read: dict[str, Any] | None = copy.deepcopy(vars(config))
        except Exception:  # a field that cannot be copied: written out each time
            self._read = None

    def still(self, config: PreTrainedConfig) -> bool:
        """Whether ``config`` reads as it did; writing it out takes far longer."""
        try:
            return self._read == vars(config)
        except (RuntimeError, ValueError):  # a field that is an array: equal or not is no single answer
            return False


def _of_config(config: PreTrainedConfig) -> dict[str, Any]:
    kind: Any = type(config)
    usual = _usual(kind)
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if _IDLE.fullmatch(name) or name == "kwargs":
            continue
        if isinstance(value, PreTrainedConfig):
            found |= {f"{name}.{inner}": its for inner, its in _of_config(value).items()}
            continue
        told = _flat(name, value.to_dict() if hasattr(value, "to_dict") else value)
        if name not in usual or told != _flat(name, usual[name]):  # a tuple is a list when it is read
            found |= told
    rope = [
        str(value) for name, value in found.items() if name.startswith(("rope_parameters", "rope_scaling"))
    ]
    if not any(kind in value for kind in _GROWS for value in rope):
        found.pop("max_position_embeddings", None)
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    """A field as numbers and short texts, which a file's header and a message can hold."""
    if isinstance(value, dict):
        return {k: v for key, its in value.items() for k, v in _flat(f"{name}.{key}", its).items()}
    if value is None or isinstance(value, bool | int | float):
        return {name: value}
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return {name: text if len(text) <= _LONG else _short_hash(text)}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _usual(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The values of a config class's own; none where it cannot be made without being told some."""
    try:
        return dict(vars(kind()))
    except Exception:
        return {}


def adapter_settings(tuners: list[Tuner]) -> dict[str, Any]:
    """``{"scaling": 2.0, "use_dora": True, …}``: what the active adapters' layers hold for each adapter
    besides weights. What differs between layers or adapters is told as a hash.
    """
    found: dict[str, list[tuple[str, Any]]] = {}
    for tuner in tuners:
        for attribute, values in vars(tuner.layer).items():
            if not isinstance(values, dict) or attribute in _NO_WEIGHTS:
                continue
            for number, adapter in enumerate(tuner.active):
                value = values.get(adapter)
                value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
                if isinstance(value, int | float | str) and value is not False:
                    found.setdefault(attribute, []).append((f"{tuner.name}.{number}", value))
    told: dict[str, Any] = {}
    for attribute, values in sorted(found.items()):
        first = values[0][1]
        same = all(value == first for _, value in values)
        told[attribute] = first if same else _short_hash(repr(sorted(values)))
    return told
