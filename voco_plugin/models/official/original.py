"""A checkpoint of the original LLaVA code: its config, what can be converted, where its parts are."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from . import weights
from .checkpoint import PROJECTOR, Reader, weight_files
from .processor import select_strategy


def local_folder(source: str | os.PathLike, what: str) -> Path:
    """A local folder, or the snapshot of a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(source)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(f"the {what} {name} does not exist; give a folder or a hub id.")
    from huggingface_hub import snapshot_download

    kinds = ("json", "model", "safetensors", "bin", "txt")
    try:
        return Path(snapshot_download(name, allow_patterns=[f"*.{kind}" for kind in kinds]))
    except Exception as error:  # no network, offline mode, no such repository: each has its own class
        raise FileNotFoundError(
            f"the {what} {name} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}); give a folder."
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of the original code; what cannot be converted raises with the reason."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no checkpoint of the LLaVA code.")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} is a LoRA checkpoint of the LLaVA code; merge it there first (its scripts/"
            "merge_lora_weights.py), then convert the result."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, classes = config.get("model_type"), config.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a config ({error}).") from None
    if "text_config" in config:
        raise ValueError(f"{folder} is in transformers' format already; load it with voco_plugin.load.")
    if kind not in ("llava", "llava_llama") or (classes and "LlavaLlamaForCausalLM" not in classes):
        raise ValueError(
            f"{path} is of a {', '.join(classes) or kind}; only LlavaLlamaForCausalLM of LLaVA-1.5 and "
            "VoCo-LLaMA is converted."
        )
    wanted = ("mm_vision_tower", "mm_hidden_size", "hidden_size", "vocab_size")
    if missing := [key for key in wanted if key not in config]:
        raise ValueError(f"{path} has no {', '.join(missing)}; it is no config of a LLaVA.")
    for key, plain in (("mm_patch_merge_type", ("flat",)), ("image_aspect_ratio", ("square", "pad"))):
        if config.get(key) not in (None, *plain):
            raise ValueError(
                f"{key}={config[key]!r} is LLaVA-NeXT's way of cutting images into tiles; only "
                f"{' and '.join(plain)} of LLaVA-1.5 can be converted."
            )
    is_linear(config)
    select_strategy(config)
    return config


def is_linear(config: dict[str, Any]) -> bool:
    """Whether the projector is one linear layer (``mlp1x_gelu`` is); else it is two with GELU between."""
    kind = config.get("mm_projector_type", "linear")
    depth = re.fullmatch(r"mlp(\d+)x_gelu", str(kind))
    if kind == "linear" or (depth and depth[1] == "1"):
        return True
    if not (depth and depth[1] == "2"):
        raise ValueError(
            f"mm_projector_type={kind!r} has no counterpart in transformers' LLaVA, whose projector has two "
            "layers; linear and mlp2x_gelu can be converted."
        )
    return False


def find_weights(folder: Path, config: dict[str, Any], language_model: Any, reader: Reader) -> tuple:
    """``(entries by new name, names without one, folder of the LLM given)``."""
    linear = is_linear(config)
    files = weight_files(folder)
    if not files and (folder / PROJECTOR).is_file():
        if language_model is None:
            raise ValueError(
                f"{folder} holds a projector alone ({PROJECTOR}, stage 1): give the LLM it was trained "
                "for as --language-model."
            )
        llm = local_folder(language_model, "language model")
        base, unknown = weights.rename(
            reader.entries(weight_files(llm)), lambda name: weights.llava_name(name, linear)
        )
        own, more = weights.rename(
            reader.entries([folder / PROJECTOR]), lambda name: weights.llava_name(name, linear)
        )
        return {**base, **own}, [*unknown, *more], llm
    if not files:
        raise FileNotFoundError(f"{folder} holds no pytorch_model*.bin, model*.safetensors or {PROJECTOR}.")
    if language_model is not None:
        raise ValueError(f"{folder} holds a language model of its own; leave --language-model out.")
    return *weights.rename(reader.entries(files), lambda name: weights.llava_name(name, linear)), None


def find_tower(folder: Path, config: dict[str, Any], given: Any) -> tuple[Path, Any]:
    """The CLIP's folder and its vision config."""
    from transformers import CLIPVisionConfig

    named = str(config["mm_vision_tower"])
    beside = folder / named
    where = given if given is not None else (beside if beside.is_dir() else named)
    try:
        tower = local_folder(where, "vision tower")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} (--vision-tower says where the CLIP is)") from None
    path = tower / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {tower} is no CLIP checkpoint.")
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{path} is of a {kind}; the original code's vision tower is a CLIP.")
    clip = CLIPVisionConfig.from_pretrained(tower)
    if clip.hidden_size != config["mm_hidden_size"]:
        raise ValueError(
            f"{tower} has features of size {clip.hidden_size}, the checkpoint's projector reads "
            f"{config['mm_hidden_size']}; give the tower it was trained with ({named})."
        )
    return tower, clip
