"""QLoRA: what must hold before a 4-bit model loads, and what of it stays unquantized."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from ..models.model_paths import base_of_adapter
from .parts import PROJECTOR, VISION, ModelParts


def check_quantization(quantization_config: Any, adapted: bool) -> None:
    """Refuse ``bitsandbytes`` quantization where it cannot train.

    Args:
        quantization_config: a ``BitsAndBytesConfig``, or TRL's ``ModelConfig``, which asks for one by the
            same keys; ``None`` and other methods' configs pass.
        adapted: whether adapters train on top of it.

    Raises:
        ValueError: there is no GPU, or no adapter to train.
        ImportError: ``bitsandbytes`` is not installed.
    """
    key = _key(quantization_config)
    if key is None:
        return
    if not adapted:
        raise ValueError(f"{key}: quantized weights cannot be trained; add LoRA (use_peft: true).")
    if not has_gpu():
        raise ValueError(
            f"{key} needs a GPU, and torch sees none; leave it out (--{key} false) to train LoRA on whole "
            "weights."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"{key} needs bitsandbytes: pip install 'voco_plugin[qlora]'.")


def has_gpu() -> bool:
    """Whether there is a GPU that bitsandbytes trains on."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def _key(config: Any) -> str | None:
    """The key that asked for ``config``; ``None`` where it is not bitsandbytes'."""
    if getattr(config, "load_in_4bit", False):
        return "load_in_4bit"
    return "load_in_8bit" if getattr(config, "load_in_8bit", False) else None


def language_model_only(quantization_config: Any, source: str, **options: Any) -> Any:
    """A copy of ``quantization_config`` that leaves vision tower, projector and LM head as they are.

    Quantized modules cannot be trained themselves, and quantizing a vision tower costs more accuracy than the
    memory is worth: 0.3 B parameters next to 7 B. A list of modules that the user gives
    (``llm_int8_skip_modules``) is kept.

    Args:
        source: path or hub id of the model; only its config is read.
    """
    if _key(quantization_config) is None or quantization_config.llm_int8_skip_modules is not None:
        return quantization_config
    from transformers import AutoConfig, AutoModelForImageTextToText

    adapter = Path(source) / "adapter_config.json"
    if adapter.is_file():
        source = base_of_adapter(os.fspath(source), str(adapter))
    known = {k: options[k] for k in ("revision", "trust_remote_code") if options.get(k)}
    config = AutoConfig.from_pretrained(os.fspath(source), **known)
    with torch.device("meta"):  # the names alone: nothing is allocated
        model = AutoModelForImageTextToText.from_config(config)
    parts = ModelParts(model)
    keep = [*parts.roots(model, VISION), *parts.roots(model, PROJECTOR)]
    if parts.head is not None:
        keep.append(parts.head)
    changed = copy.deepcopy(quantization_config)
    changed.llm_int8_skip_modules = keep
    return changed
