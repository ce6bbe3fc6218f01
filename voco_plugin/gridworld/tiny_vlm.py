"""A tiny vision-language model of the real classes, to train on the gridworld on a CPU.

`build_tiny_vlm` gives a `LlavaForConditionalGeneration` (CLIP tower, two-layer GELU projector, Llama LLM) and
its `LlavaProcessor`: a tokenizer trained with `tokenizers`, a CLIP image processor at the tiny resolution,
and a chat template in LLaVA-1.5's form. `write_tiny_vlm` also pre-trains the tower (`tiny_tower`) and aligns
the projector (`tiny_align`), which LLaVA starts from. What `save_pretrained` writes is an ordinary
transformers checkpoint.

What may surprise:

- The template marks each answer and its `</s>` with `{% generation %}`: assistant-only loss works in TRL.
- As in LLaVA, features come from the tower's second-to-last layer without the class token
  (`vision_feature_layer=-2`, `"default"`), so an image takes `(image_size / patch_size)²` tokens.
- Linears and embeddings start at a standard deviation of 0.02; at 1.0 the decoder does not learn.
- `<voco>` is not in this tokenizer's vocabulary: attaching adds it, as it does to any model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from voco_plugin.gridworld.tiny_align import align_projector
from voco_plugin.gridworld.tiny_processor import build_processor
from voco_plugin.gridworld.tiny_tower import INIT_STD, pretrain_tower

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


def build_tiny_vlm(
    *,
    image_size: int = 64,
    patch_size: int = 16,
    vision_width: int = 128,
    vision_layers: int = 3,
    text_width: int = 128,
    text_layers: int = 4,
    text_heads: int = 4,
    text_inner: int | None = None,
    question_set: str = "phrases",
    boxes: bool = False,
    video: bool = False,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Builds the model, with random weights in fp32, and its processor.

    Args:
        image_size, patch_size: pixels; the first a multiple of the second.
        vision_width, vision_layers: of the CLIP tower; its last layer is not used, as in LLaVA.
        text_width, text_layers, text_heads: of the Llama LLM.
        text_inner: width inside its feed-forward blocks; None: four times `text_width`.
        question_set, boxes, video: whose words the tokenizer has.
        seed: of the weights.

    Raises:
        ValueError: a size does not divide.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    if image_size % patch_size:
        raise ValueError(
            f"image_size={image_size} is no multiple of patch_size={patch_size}: change one of them"
        )
    if text_width % text_heads:
        raise ValueError(
            f"text_width={text_width} is no multiple of text_heads={text_heads}: change one of them"
        )
    processor = build_processor(image_size, patch_size, question_set, boxes, video)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=max(1, vision_width // 32),
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=vision_width,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=text_width,
        intermediate_size=4 * text_width if text_inner is None else text_inner,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        num_key_value_heads=text_heads,
        max_position_embeddings=1024,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, std=INIT_STD)
                bias = getattr(module, "bias", None)
                if bias is not None:
                    torch.nn.init.zeros_(bias)
    finally:
        torch.random.set_rng_state(state)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def write_tiny_vlm(
    out_dir: str | Path,
    *,
    grid: int = 2,
    num_colors: int = 4,
    cell_pixels: int = 32,
    tower_steps: int = 2000,
    align_steps: int = 600,
    seed: int = 0,
    **model_options: Any,
) -> dict[str, float]:
    """Builds the model for one gridworld, pre-trains its tower, aligns its projector, and saves model and
    processor into `out_dir`.

    Args:
        out_dir: the checkpoint folder.
        grid, num_colors, cell_pixels: the gridworld, as for `write_gridworld`; image_size follows.
        tower_steps: of `pretrain_tower`; 0 leaves the tower random.
        align_steps: of `align_projector`; 0 leaves the projector random.
        seed: of weights, images and batches.
        model_options: the other arguments of `build_tiny_vlm`.

    Returns:
        What `pretrain_tower` and `align_projector` return.
    """
    model, processor = build_tiny_vlm(image_size=grid * cell_pixels, seed=seed, **model_options)
    world = {"grid": grid, "num_colors": num_colors, "cell_pixels": cell_pixels}
    figures = pretrain_tower(model, processor, steps=tower_steps, seed=seed, **world) if tower_steps else {}
    if align_steps:
        figures |= align_projector(model, processor, steps=align_steps, seed=seed, **world)
    model.save_pretrained(out_dir)
    processor.save_pretrained(out_dir)
    return figures
