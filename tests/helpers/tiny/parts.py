"""Tiny encoders and LLMs as checkpoint folders, to compose from: real classes, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .vocab import TOKENS, tokenizer

SIDE, PATCH, WIDTH = 16, 4, 24


def _timm(arch: str, **args: Any) -> Any:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    return TimmWrapperModel(TimmWrapperConfig(architecture=arch, model_args=args))


def _clip() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**_VIT, projection_dim=WIDTH))


def _siglip() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**_VIT))


def _dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**_VIT))


def _dinov3() -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(**_VIT, num_register_tokens=2))


def _open_clip() -> Any:
    from voco_plugin.models.encoders.open_clip_model import OpenClipVisionConfig, OpenClipVisionModel
    from voco_plugin.models.registration import register

    register()
    vision = {"layers": 3, "width": WIDTH, "head_width": 12, "image_size": SIDE, "patch_size": PATCH}
    sizes = {"hidden_size": WIDTH, "image_size": SIDE, "patch_size": PATCH}
    return OpenClipVisionModel(OpenClipVisionConfig(vision_cfg=vision, embed_dim=16, **sizes))


_VIT = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_TIMM_VIT = {"embed_dim": WIDTH, "depth": 3, "num_heads": 2, "img_size": SIDE, "patch_size": PATCH}
ENCODERS: dict[str, Any] = {
    "clip": _clip,
    "siglip": _siglip,
    "dinov2": _dinov2,
    "dinov3": _dinov3,
    "timm_vit": lambda: _timm("vit_tiny_patch16_224", **_TIMM_VIT),
    "timm_siglip": lambda: _timm("vit_so400m_patch14_siglip_384", **_TIMM_VIT),
    "timm_eva": lambda: _timm("eva_giant_patch14_224", **_TIMM_VIT),
    "timm_convnext": lambda: _timm("convnext_atto", depths=[1, 1, 1, 1], dims=[4, 8, 16, WIDTH]),
    "open_clip": _open_clip,
}


def write_encoder(folder: Path, name: str, seed: int = 0) -> str:
    """Write one of ``ENCODERS``; weights large enough that the image matters."""
    torch.manual_seed(seed)
    model = ENCODERS[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    path = folder / name
    model.save_pretrained(path)
    if not name.startswith("timm"):
        from transformers import CLIPImageProcessor

        crop = {"height": SIDE, "width": SIDE}
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(path)
    return str(path)


def _llm_configs() -> dict[str, Any]:
    from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

    common = {
        "vocab_size": len(TOKENS) - 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    common["vocab_size"] = len(TOKENS)
    return {
        "llama": LlamaConfig(**common),
        "mistral": MistralConfig(**common, sliding_window=8),
        "qwen3": Qwen3Config(**common, tie_word_embeddings=True),
        "gemma3": Gemma3TextConfig(**common, sliding_window=8, query_pre_attn_scalar=8),
        "gemma2": Gemma2Config(**common, sliding_window=8, query_pre_attn_scalar=8),
    }


def write_llm(folder: Path, name: str, seed: int = 0, config: Any = None) -> str:
    """Write one of llama, mistral, qwen3, gemma3, gemma2 (or a causal model of ``config``)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or _llm_configs()[name])
    path = folder / name
    model.save_pretrained(path)
    made = tokenizer()
    made.chat_template = "{{ '<|im_start|>' }}"  # ChatML, as far as one looks
    made.save_pretrained(path)
    return str(path)
