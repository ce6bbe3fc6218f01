"""Models in which the rule cannot hold, and the error that attaching one gives."""

from __future__ import annotations

import torch
import transformers as hf

import voco_plugin as vp
from tiny.wide import END, IMAGE, START, VIDEO

_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO,
    "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_CONV = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}

CONFIGS = {
    "qwen3_5": lambda: hf.Qwen3_5Config(**_IDS, text_config=_HYBRID),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeConfig(**_IDS, text_config=_HYBRID),
    "minicpmv4_6": lambda: hf.MiniCPMV4_6Config(),
    "lfm2_vl": lambda: hf.Lfm2VlConfig(text_config=_CONV),
    "llava with Jamba": lambda: hf.LlavaConfig(
        text_config=hf.JambaConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1),
        image_token_index=IMAGE,
    ),
    "llava with RecurrentGemma": lambda: hf.LlavaConfig(
        text_config=hf.RecurrentGemmaConfig(num_hidden_layers=3), image_token_index=IMAGE
    ),
    "mllama": lambda: hf.MllamaConfig(),
    "idefics": lambda: hf.IdeficsConfig(),
    "florence2": lambda: hf.Florence2Config(),
}


def refusal(name: str) -> str:
    """The message of the error that `attach` raises; empty where it attaches."""
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(CONFIGS[name]())
    try:
        vp.attach(model, vp.VoCoConfig(token_id=4))
    except ValueError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    """Of every model here."""
    return {name: refusal(name) for name in CONFIGS}
