"""More families, one image size each: `BACKBONES` beside the families of `models.py`, in the same classes
users load.

Each entry builds its config, says what one image's tokens are, and makes one image's forward arguments, which
are joined along dim 0 for a batch. What transformers 5.23 wants, where it surprises:

- Mixture-of-experts layers run fp64 only with `experts_implementation="eager"`.
- Mistral 3, Pixtral and Idefics 2 put tokens inside an image that their config does not name (a row break, an
  end): they come from the processor.
- PaliGemma reads a prompt both ways only where it is given `token_type_ids` (0 prompt, 1 answer), as its
  processor does.
- Llama 4 attends in chunks on three layers of four, and not at all by position on the fourth.
- Phi-4 has its image token in `vision_config`, and is an `AutoModelForCausalLM`.
- Kimi K2.5 (and any Llava with a DeepSeek V3 text model) has latent attention: the rotated part of a key
stands
  where other caches have the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf

from .vocab import BOS, EOS, IDS, PAD

STD = 0.2
WINDOW = 8
IMAGE, VIDEO = IDS["<image>"], IDS["<video>"]
START, END, BREAK = IDS["<img>"], IDS["</img>"], IDS["<unused1>"]
_VIDEO_START, _VIDEO_END = IDS["<start_of_image>"], IDS["<end_of_image>"]
_INDICATORS = [IDS[f"<row_1_col_{c}>"] for c in (1, 2, 3)] + [IDS[f"<row_2_col_{c}>"] for c in (1, 2)]
_FAKE = IDS["<fake_token_around_image>"]
VOCAB = 211

Pixels = Callable[[torch.Generator], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Backbone:
    """One family.

    Attributes:
        config: its tiny config, fresh.
        pixels: the forward arguments of one image.
        run: the ids of one image, markers included.
        types: which token types its forward takes: `mm_token_type_ids`, `token_type_ids` or none.
        rows: whether images are laid out per row of the batch, not listed.
        loose_fp64: upstream computes a part in fp32 whatever the dtype (Gemma's norms, routers), so that fp64
            is good to about 1e-6 only.
        eager_only: whether it caps its attention logits, which sdpa cannot.
    """

    config: Callable[[], hf.PreTrainedConfig]
    pixels: Pixels
    run: list[int]
    types: str | None = None
    rows: bool = False
    loose_fp64: bool = False
    eager_only: bool = False


def _text(**more) -> dict:
    return {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "initializer_range": STD, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **more,
    }  # fmt: skip


def _vision(image: int, patch: int, **more) -> dict:
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": image, "patch_size": patch, "initializer_range": STD, **more,
    }  # fmt: skip


def _image(side: int, **sizes: list[list[int]]) -> Pixels:
    def make(generator):
        sized = {k: torch.tensor(v) for k, v in sizes.items()}
        return {"pixel_values": torch.randn(1, 3, side, side, generator=generator), **sized}

    return make


def _patches(*shape: int, **grids: list) -> Pixels:
    def make(generator):
        return {
            "pixel_values": torch.randn(*shape, generator=generator),
            **{k: torch.tensor(v) for k, v in grids.items()},
        }

    return make


def _clip(**more) -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**_vision(12, 4, initializer_factor=3.0, **more))


def _siglip(image: int, patch: int, **more) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**_vision(image, patch, vision_use_head=False, **more))


def _pixtral() -> hf.PixtralVisionConfig:
    return hf.PixtralVisionConfig(**_vision(16, 4))


def _llava(text: Callable[[], hf.PreTrainedConfig], **more) -> Callable[[], hf.PreTrainedConfig]:
    def make():
        options = {"vision_config": _clip(), "image_seq_length": 9, **more}
        if callable(options["vision_config"]):
            options["vision_config"] = options["vision_config"]()
        return hf.LlavaConfig(text_config=text(), image_token_index=IMAGE, **options)

    return make


def _gemma2() -> hf.Gemma2Config:
    return hf.Gemma2Config(**_text(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16))


def _deepseek() -> hf.DeepseekV3Config:
    return hf.DeepseekV3Config(
        **_text(num_key_value_heads=4), q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
    )  # fmt: skip


def _mistral(window: int | None = None) -> hf.MistralConfig:
    return hf.MistralConfig(**_text(sliding_window=window))


def _mistral3(window: int | None) -> Callable[[], hf.PreTrainedConfig]:
    return lambda: hf.Mistral3Config(
        vision_config=_pixtral(), text_config=_mistral(window), image_token_index=IMAGE, spatial_merge_size=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def _paligemma(text: Callable[[], hf.PreTrainedConfig]) -> Callable[[], hf.PreTrainedConfig]:
    return lambda: hf.PaliGemmaConfig(
        vision_config=_siglip(12, 4, projection_dim=64), text_config=text(), image_token_index=IMAGE,
        projection_dim=64, hidden_size=64, vocab_size=VOCAB,
    )  # fmt: skip


def _llama4() -> hf.PreTrainedConfig:
    vision = _vision(16, 4, vision_output_dim=48, projector_input_dim=48, projector_output_dim=48)
    text = _text(
        head_dim=16, num_hidden_layers=4, intermediate_size_mlp=96, num_local_experts=2,
        attention_chunk_size=WINDOW, no_rope_layers=[1, 1, 1, 0], interleave_moe_layer_step=2,
    )  # fmt: skip
    return hf.Llama4Config(
        boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE,
        vision_config={**vision, "intermediate_size": 128}, text_config=text,
    )  # fmt: skip


def _phi4() -> hf.PreTrainedConfig:
    vision = {
        **_vision(16, 4), "num_hidden_layers": 3, "crop_size": 16, "image_token_id": IMAGE,
        "feature_layer": -2,
    }  # fmt: skip
    vision.pop("initializer_range")
    audio = {
        "hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2,
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "input_size": 80,
        "nemo_conv_channels": 32, "audio_token_id": _INDICATORS[0], "time_reduction": 8,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    return hf.Phi4MultimodalConfig(
        **_text(original_max_position_embeddings=1024, rope_parameters=rope), vision_config=vision,
        audio_config=audio,
    )  # fmt: skip


def _phi4_image(generator):
    return {
        "image_pixel_values": torch.randn(1, 2, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([[16, 16]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4),
    }


_GRID_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_MARKER_IDS = {
    "image_start_token_id": START, "image_end_token_id": END,
    "video_start_token_id": _VIDEO_START, "video_end_token_id": _VIDEO_END,
}  # fmt: skip
_VISION_IDS = {"vision_start_token_id": START, "vision_end_token_id": END}
_GRID = _patches(24, 3 * 2 * 16, image_grid_thw=[[1, 4, 6]])
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _mrope(*section: int, **more) -> dict:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}


def _glm(cls: type, **text) -> Callable[[], hf.PreTrainedConfig]:
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "image_size": 16, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "intermediate_size": 48,
    }  # fmt: skip
    return lambda: cls(
        **_GRID_IDS, **_MARKER_IDS, text_config=_text(rope_parameters=_mrope(2, 3, 3), **text),
        vision_config=vision,
    )  # fmt: skip


def _qwen3_vl_moe() -> hf.PreTrainedConfig:
    text = _text(
        rope_parameters=_mrope(3, 3, 2, mrope_interleaved=True), num_hidden_layers=3, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1,
    )  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return hf.Qwen3VLMoeConfig(**_GRID_IDS, **_VISION_IDS, text_config=text, vision_config=vision)


def _ernie() -> hf.PreTrainedConfig:
    text = _text(
        rope_parameters=_mrope(3, 3, 2), moe_intermediate_size=[32, 32], moe_num_experts=4, moe_k=2,
        moe_num_shared_experts=1, mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "intermediate_size": 48,
    }  # fmt: skip
    return hf.Ernie4_5_VLMoeConfig(
        **_GRID_IDS, **_MARKER_IDS, tie_word_embeddings=False, text_config=text, vision_config=vision
    )


def _ovis2() -> hf.PreTrainedConfig:
    vision = _vision(16, 4, hidden_stride=2, vocab_size=32, num_visual_indicator_tokens=5)
    return hf.Ovis2Config(
        vision_config=vision, text_config=hf.Qwen2Config(**_text()), image_token_id=IMAGE,
        visual_indicator_token_ids=_INDICATORS, vocab_size=VOCAB, hidden_size=64,
    )  # fmt: skip


def _cohere() -> hf.Cohere2Config:
    layers = ["sliding_attention", "full_attention"]
    return hf.Cohere2Config(**_text(sliding_window=WINDOW, layer_types=layers, head_dim=16, logit_scale=0.5))


def _aria() -> hf.PreTrainedConfig:
    return hf.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **_vision(12, 4)},
        text_config=hf.AriaTextConfig(**_text(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)),
        image_token_index=IMAGE, projector_patch_to_query_dict={9: 4}, initializer_range=STD,
    )  # fmt: skip


def _deepseek_vl() -> hf.PreTrainedConfig:
    vision = {"model_type": "siglip_vision_model", **_vision(12, 4, vision_use_head=False)}
    return hf.DeepseekVLConfig(
        text_config=hf.LlamaConfig(**_text()), vision_config=vision, image_token_id=IMAGE
    )


def _kimi() -> hf.PreTrainedConfig:
    vision = {
        "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4, "num_attention_heads": 2,
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
    }  # fmt: skip
    return hf.Kimi_K25Config(
        **_GRID_IDS, **_VISION_IDS, projection_hidden_size=32, text_config=_deepseek(), vision_config=vision
    )


def _perception_lm() -> hf.PreTrainedConfig:
    arguments = {
        "embed_dim": 32, "img_size": (16, 16), "depth": 2, "global_pool": "", "patch_size": 4, "num_heads": 2,
        "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": (1, 1),
    }  # fmt: skip
    vision = {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": True,
        "num_classes": 32, "global_pool": "map", "model_args": arguments,
    }  # fmt: skip
    return hf.PerceptionLMConfig(
        text_config=hf.LlamaConfig(**_text()), vision_config=vision, image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2, vision_use_cls_token=True,
    )  # fmt: skip


def _got_ocr2() -> hf.PreTrainedConfig:
    vision = _vision(
        32, 4, output_channels=16, mlp_dim=48, window_size=4, global_attn_indexes=[1], initializer_range=0.1
    )
    return hf.GotOcr2Config(
        vision_config=vision, text_config=hf.Qwen2Config(**_text()), image_token_index=IMAGE,
        image_seq_length=4,
    )  # fmt: skip


def _idefics2() -> hf.PreTrainedConfig:
    perceiver = {
        "hidden_size": 64, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    return hf.Idefics2Config(
        image_token_id=IMAGE, vision_config=_vision(12, 4), perceiver_config=perceiver, text_config=_mistral()
    )


def _gemma4(**more) -> Callable[[], hf.PreTrainedConfig]:
    text = _text(
        head_dim=16, num_hidden_layers=3, sliding_window=WINDOW, hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], global_head_dim=16,
        vocab_size_per_layer_input=VOCAB, **more,
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "patch_size": 4,
        "position_embedding_size": 64,
    }  # fmt: skip
    return lambda: hf.Gemma4Config(
        image_token_id=IMAGE, boi_token_id=START, eoi_token_id=END, audio_config=None, text_config=text,
        vision_config=vision,
    )  # fmt: skip


def _gemma4_image(generator):
    columns, rows = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="xy")
    return {
        "pixel_values": torch.rand(1, 24, 48, generator=generator),
        "image_position_ids": torch.stack((columns, rows), -1).reshape(1, 24, 2),
    }


def _next_video() -> hf.PreTrainedConfig:
    return hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**_vision(12, 6, initializer_factor=3.0)),
        text_config=hf.LlamaConfig(**_text()), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
    )  # fmt: skip


def _video_llava() -> hf.PreTrainedConfig:
    return hf.VideoLlavaConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**_text()), image_token_index=IMAGE,
        video_token_index=VIDEO, image_seq_length=9, video_seq_length=36,
    )  # fmt: skip


def _video_llama_3() -> hf.PreTrainedConfig:
    return hf.VideoLlama3Config(
        **_GRID_IDS, text_config=hf.Qwen2Config(**_text()), vision_config=_vision(16, 4)
    )


# transformers before 5.21 calls it by the name of VipLLaVA's own checkpoints
_VIP_LAYERS = "vision_feature_layer" + "s" * hasattr(hf.VipLlavaConfig, "vision_feature_layers")


def _vip_llava() -> hf.PreTrainedConfig:
    return hf.VipLlavaConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**_text()), image_token_index=IMAGE,
        image_seq_length=9, **{_VIP_LAYERS: [-1, -2]},
    )  # fmt: skip


_NINE = [IMAGE] * 9
_MARKED = [START, *[IMAGE] * 4, END]
_GRID_RUN = [START, *[IMAGE] * 6, END]
_TWO_ROWS = [IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END]
_PIXTRAL_RUN = [*[IMAGE] * 4, BREAK, *[IMAGE] * 4, END]

BACKBONES: dict[str, Backbone] = {
    "llava_qwen3": Backbone(_llava(lambda: hf.Qwen3Config(**_text(head_dim=16))), _image(12), _NINE),
    "llava_gemma2": Backbone(_llava(_gemma2), _image(12), _NINE, loose_fp64=True, eager_only=True),
    "llava_phi": Backbone(_llava(lambda: hf.PhiConfig(**_text())), _image(12), _NINE),
    "llava_deepseek": Backbone(_llava(_deepseek), _image(12), _NINE, loose_fp64=True),
    "llava_pixtral": Backbone(
        _llava(
            _mistral, vision_config=_pixtral, vision_feature_layer=-1, vision_feature_select_strategy="full"
        ),
        _image(16, image_sizes=[[8, 16]]), _PIXTRAL_RUN,
    ),
    "llava_next_video": Backbone(
        _next_video, _patches(1, 3, 3, 12, 12, image_sizes=[[12, 24]]), [IMAGE] * (4 + 8 + 2)
    ),
    "video_llava": Backbone(
        _video_llava, lambda g: {"pixel_values_images": torch.randn(1, 3, 12, 12, generator=g)}, _NINE
    ),
    "vipllava": Backbone(_vip_llava, _image(12), _NINE),
    "mistral3": Backbone(_mistral3(None), _image(16, image_sizes=[[16, 16]]), _TWO_ROWS),
    "mistral3_window": Backbone(_mistral3(WINDOW), _image(16, image_sizes=[[16, 16]]), _TWO_ROWS),
    "paligemma": Backbone(
        _paligemma(lambda: hf.GemmaConfig(**_text(head_dim=16))), _image(12), _NINE, "token_type_ids"
    ),
    "paligemma2": Backbone(
        _paligemma(_gemma2), _image(12), _NINE, "token_type_ids", loose_fp64=True, eager_only=True
    ),
    "llama4": Backbone(_llama4, _image(16), _MARKED, loose_fp64=True),
    "phi4_multimodal": Backbone(_phi4, _phi4_image, [IMAGE] * 13),
    "glm4v": Backbone(_glm(hf.Glm4vConfig), _GRID, _GRID_RUN, "mm_token_type_ids"),
    "glm46v": Backbone(_glm(hf.Glm46VConfig), _GRID, _GRID_RUN, "mm_token_type_ids"),
    "glm4v_moe": Backbone(
        _glm(
            hf.Glm4vMoeConfig, **_MOE, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
            head_dim=16, partial_rotary_factor=1.0,
        ),
        _GRID, _GRID_RUN, "mm_token_type_ids",
    ),
    "qwen3_vl_moe": Backbone(_qwen3_vl_moe, _GRID, _GRID_RUN, "mm_token_type_ids"),
    "ernie4_5_vl_moe": Backbone(
        _ernie, _patches(24, 48, image_grid_thw=[[1, 4, 6]]), _GRID_RUN, "mm_token_type_ids"
    ),
    "ovis2": Backbone(_ovis2, _image(16), [_INDICATORS[0], *[IMAGE] * 4, _INDICATORS[1]]),
    "aya_vision": Backbone(
        lambda: hf.AyaVisionConfig(
            vision_config=_siglip(16, 4), text_config=_cohere(), image_token_index=IMAGE
        ),
        _image(16), _MARKED,
    ),
    "cohere2_vision": Backbone(
        lambda: hf.Cohere2VisionConfig(
            vision_config=_siglip(16, 4), text_config=_cohere(), image_token_id=IMAGE,
            alignment_intermediate_size=64,
        ),
        _image(16), _MARKED,
    ),
    "aria": Backbone(_aria, _image(12), [IMAGE] * 4),
    "video_llama_3": Backbone(
        _video_llama_3, _patches(24, 48, image_grid_thw=[[1, 4, 6]], image_merge_sizes=[2]), [IMAGE] * 6
    ),
    "deepseek_vl": Backbone(_deepseek_vl, _image(12), _NINE),
    "kimi_k25": Backbone(
        _kimi, _patches(24, 3, 4, 4, image_grid_thw=[[1, 4, 6]]), _GRID_RUN, loose_fp64=True
    ),
    "perception_lm": Backbone(
        _perception_lm, lambda g: {"pixel_values": torch.randn(1, 1, 3, 16, 16, generator=g)}, [IMAGE] * 4
    ),
    "got_ocr2": Backbone(_got_ocr2, _image(32), _MARKED),
    "idefics2": Backbone(
        _idefics2, lambda g: {"pixel_values": torch.randn(1, 3, 12, 12, generator=g)},
        [_FAKE, *[IMAGE] * 3, _FAKE], rows=True,
    ),
    "gemma4": Backbone(_gemma4(), _gemma4_image, _GRID_RUN, "mm_token_type_ids"),
    "gemma4_both_ways": Backbone(
        _gemma4(use_bidirectional_attention="vision"), _gemma4_image, _GRID_RUN, "mm_token_type_ids"
    ),
}  # fmt: skip
NAMES: tuple[str, ...] = tuple(BACKBONES)
EAGER_ONLY: frozenset[str] = frozenset(n for n, b in BACKBONES.items() if b.eager_only)


def load_class(name: str) -> type:
    """The auto class of a family: Phi-4 is registered as a causal LM only."""
    return hf.AutoModelForCausalLM if name == "phi4_multimodal" else hf.AutoModelForImageTextToText
