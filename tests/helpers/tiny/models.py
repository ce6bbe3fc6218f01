"""Tiny random models of real transformers classes, built from configs alone (no hub).

Two to four text layers, hidden 64, head dim 16, two KV heads for four query heads, weights at std 0.2 so that
logits differ by whole units while fp32 rounding stays near 1e-5. Parameters that upstream initialises to a
constant (norms, biases, layer scales, Gemma 3's projector, which is all zeros) get noise too: a mistake in
them would otherwise not show.
"""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from voco_plugin._compat import patch_llama4

from .vocab import BOS, IDS, PAD, SPARE, TOKENS
from .wide import BACKBONES, load_class

STD = 0.2
WINDOW = 8
"""Sliding window of llava_mistral and of gemma3's local layers: shorter than one image block."""
VOCAB = {"llava_llama": len(TOKENS), "llava_qwen2": 256}
"""Where it is not 211: no row beyond the tokenizer (a new token means a resize); a multiple of 64."""


def _eos(name: str) -> int:
    """How the family's chat template ends a turn, as its processor's `eos_token`."""
    token = "</s>"
    if name.startswith("qwen") or name == "internvl":
        token = "<|im_end|>"
    elif name in ("idefics3", "smolvlm"):
        token = "<end_of_utterance>"
    elif name == "gemma3":
        token = "<end_of_turn>"
    return IDS[token]


def _text(name: str, **more) -> dict:
    return {
        "vocab_size": VOCAB.get(name, 211),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": STD,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": _eos(name),
        **more,
    }


def _vision(image_size: int, patch_size: int, **more) -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        "initializer_range": STD,
        **more,
    }


def _llava(name: str) -> PreTrainedConfig:
    text = {
        "llava_llama": lambda: LlamaConfig(**_text(name)),
        "llava_tied": lambda: LlamaConfig(**_text(name, tie_word_embeddings=True)),
        "llava_mistral": lambda: MistralConfig(**_text(name, sliding_window=WINDOW)),
        "llava_qwen2": lambda: Qwen2Config(**_text(name)),
    }[name]()
    # CLIP's own initialisation is scaled by the layer count: initializer_factor brings it to about STD
    vision = CLIPVisionConfig(**_vision(12, 4, initializer_factor=3.0))
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS["<image>"],
        image_seq_length=9,
        tie_word_embeddings=name == "llava_tied",
    )


def _llava_next(name: str) -> PreTrainedConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_vision(12, 6, initializer_factor=3.0)),
        text_config=LlamaConfig(**_text(name)),
        image_token_index=IDS["<image>"],
        image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
        image_seq_length=4,
    )


def _llava_onevision(name: str) -> PreTrainedConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_vision(12, 6, vision_use_head=False)),
        text_config=Qwen2Config(**_text(name)),
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<video>"],
        image_grid_pinpoints=[[12, 12], [12, 24], [24, 12], [24, 24]],
    )


_QWEN_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}


def _qwen2_5_vl(name: str) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1], "initializer_range": STD,
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=_text(name, rope_parameters=rope), vision_config=vision, **_QWEN_IDS)


def _qwen2_vl(name: str) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": STD,
    }  # fmt: skip
    return Qwen2VLConfig(text_config=_text(name, rope_parameters=rope), vision_config=vision, **_QWEN_IDS)


def _qwen3_vl(name: str) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1], "initializer_range": STD,
    }  # fmt: skip
    text = _text(name, rope_parameters=rope, num_hidden_layers=3, head_dim=16)
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


def _internvl(name: str) -> PreTrainedConfig:
    return InternVLConfig(
        vision_config=_vision(16, 4, use_qk_norm=False, model_type="internvl_vision"),
        text_config=Qwen2Config(**_text(name)),
        image_token_id=IDS["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _gemma3(name: str) -> PreTrainedConfig:
    text = _text(
        name, num_hidden_layers=3, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**_vision(24, 4, vision_use_head=False)),
        text_config=Gemma3TextConfig(**text),
        mm_tokens_per_image=9,
        image_token_index=IDS["<image_soft_token>"],
        boi_token_index=IDS["<start_of_image>"],
        eoi_token_index=IDS["<end_of_image>"],
        initializer_range=STD,
    )


def _idefics3(name: str) -> PreTrainedConfig:
    cls = SmolVLMConfig if name == "smolvlm" else Idefics3Config
    return cls(
        vision_config=_vision(16, 4),
        text_config=LlamaConfig(**_text(name)),
        image_token_id=IDS["<image>"],
        scale_factor=2,
        pad_token_id=PAD,
    )


_CONFIGS = {
    "llava_llama": _llava,
    "llava_mistral": _llava,
    "llava_qwen2": _llava,
    "llava_tied": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
}
FIRST: tuple[str, ...] = tuple(_CONFIGS)
"""The families of this file, each with several image sizes."""
NAMES: tuple[str, ...] = (*FIRST, *BACKBONES)


def check_name(name: str) -> None:
    if name not in BACKBONES and name not in _CONFIGS:
        raise ValueError(f"no tiny model named {name!r}: choose from {', '.join(NAMES)}")


def config(name: str) -> PreTrainedConfig:
    """The config `build(name)` uses, fresh."""
    check_name(name)
    return BACKBONES[name].config() if name in BACKBONES else _CONFIGS[name](name)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The tiny model, in eval mode; the same weights for the same seed, up to rounding, in every dtype.

    The caller's random state is left alone. Only parameters take `dtype`, as `from_pretrained` does it:
    rotary frequencies stay fp32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # grouped matrix products, the default of mixture-of-experts layers, have no fp64
        experts = {"experts_implementation": "eager"} if name in BACKBONES else {}
        model = load_class(name).from_config(config(name), dtype=torch.float32, **experts)
        with torch.no_grad():
            for parameter in model.parameters():
                if not torch.isfinite(parameter).all():  # upstream leaves it unwritten
                    parameter.normal_(0.0, STD)
                elif parameter.min() == parameter.max():
                    parameter += torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else STD)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    patch_llama4(model)  # it must run without VoCo too; that attach mends it: tests/house/test_compat.py
    return model.eval()


def voco_id(name: str) -> int:
    """A spare id inside the vocabulary (`<unused0>`, known to the tokenizer) to serve as the VoCo token."""
    check_name(name)
    return SPARE
