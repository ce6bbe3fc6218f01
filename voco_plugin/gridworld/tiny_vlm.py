"""A tiny vision-language model of the real classes, to train on the gridworld on a CPU.

`build_tiny_vlm` gives a `LlavaForConditionalGeneration` (CLIP tower, two-layer GELU projector, Llama LLM) and
its `LlavaProcessor`: a tokenizer trained with `tokenizers`, a CLIP image processor at the tiny resolution,
and a chat template in LLaVA-1.5's form. `pretrain_tower` then teaches the tower what CLIP already knows when
LLaVA starts, and `tiny_align` the projector. What `save_pretrained` writes is an ordinary transformers
checkpoint.

What may surprise:

- The template marks each answer and its `</s>` with `{% generation %}`: assistant-only loss works in TRL.
- As in LLaVA, features come from the tower's second-to-last layer without the class token
  (`vision_feature_layer=-2`, `"default"`), so an image takes `(image_size / patch_size)²` tokens.
- Linears and embeddings start at a standard deviation of 0.02; at 1.0 the decoder does not learn.
- `<voco>` is no part of this tokenizer: attaching adds it, as it would to any model.

Shapes: `B` images, `S` pixels a side, `N` patches an image, `D` tower width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from voco_plugin.gridworld.scenes import COLORS, SHAPES, SPLITS, Scene, draw_scene, sample_scene
from voco_plugin.gridworld.tiny_processor import build_processor

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

INIT_STD = 0.02
CELL_CLASSES: tuple[str, ...] = (
    *(f"{color} {shape}" for color in COLORS for shape in SHAPES),
    *(f"digit {digit}" for digit in range(10)),
)


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
    from voco_plugin.gridworld.tiny_align import align_projector

    model, processor = build_tiny_vlm(image_size=grid * cell_pixels, seed=seed, **model_options)
    world = {"grid": grid, "num_colors": num_colors, "cell_pixels": cell_pixels}
    figures = pretrain_tower(model, processor, steps=tower_steps, seed=seed, **world) if tower_steps else {}
    if align_steps:
        figures |= align_projector(model, processor, steps=align_steps, seed=seed, **world)
    model.save_pretrained(out_dir)
    processor.save_pretrained(out_dir)
    return figures


def pretrain_tower(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    *,
    grid: int = 2,
    num_colors: int = 4,
    cell_pixels: int = 32,
    num_images: int = 20000,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Trains the tower, in place, to tell for each patch what its cell holds and where the patch is.

    Two linear heads, thrown away afterwards, read the features the projector will read (and the tower's last
    layer too, so that no layer stays random). The position target is needed: without it the decoder cannot
    find a cell, because RoPE alone gives it no absolute place.

    Args:
        model, processor: as `build_tiny_vlm` made them.
        grid, num_colors, cell_pixels: the gridworld to train on, as for `write_gridworld`.
        num_images: different training images.
        steps, batch_size, learning_rate: of AdamW, under a one-cycle schedule.
        seed: of images, batches and heads.

    Returns:
        `cell_accuracy` and `position_accuracy` per patch, 0…1, on held-out scenes and digits; `loss`, the
        last.
    """
    side = model.config.vision_config.image_size // processor.patch_size
    world = (grid, num_colors, cell_pixels)
    images, cells = patch_data(processor.image_processor, side, *world, num_images, "train", seed)
    held_images, held_cells = patch_data(processor.image_processor, side, *world, 512, "test", seed)
    tower = model.model.vision_tower
    width, patches = tower.config.hidden_size, cells.shape[1]
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.nn.Linear(width, n) for n in (len(CELL_CLASSES), patches) for _ in range(2)]
    for head in heads:
        torch.nn.init.normal_(head.weight, std=INIT_STD, generator=generator)
        torch.nn.init.zeros_(head.bias)
    positions = torch.arange(patches)
    parameters = [*tower.parameters(), *(value for head in heads for value in head.parameters())]
    trainable = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    tower.train()
    loss = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        loss = torch.zeros(())
        for level, features in enumerate(tower_features(model, images[rows])):
            what, where = heads[level](features), heads[2 + level](features)
            loss = loss + torch.nn.functional.cross_entropy(what.flatten(0, 1), cells[rows].flatten())
            target = positions.expand(batch_size, -1).flatten()
            loss = loss + torch.nn.functional.cross_entropy(where.flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    tower.eval()
    for parameter, flag in zip(parameters, trainable, strict=True):
        parameter.requires_grad_(flag)
        parameter.grad = None
    with torch.no_grad():
        features = tower_features(model, held_images)[0]
        right = (heads[0](features).argmax(-1) == held_cells).float().mean().item()
        placed = (heads[2](features).argmax(-1) == positions).float().mean().item()
    return {"cell_accuracy": right, "position_accuracy": placed, "loss": loss.item()}


def tower_features(model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Patch features `[B, N, D]` of the layer the projector reads, then of the last layer."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return [hidden[model.config.vision_feature_layer][:, 1:], hidden[-1][:, 1:]]


def draw_patches(
    image_processor: Any, grid: int, num_colors: int, cell_pixels: int, num_images: int, split: str, seed: int
) -> tuple[list[Scene], torch.Tensor]:
    """Scenes of a split and their pixels `[B, 3, S, S]`."""
    rng = np.random.default_rng([seed, 2 + SPLITS.index(split)])
    scenes = [sample_scene(rng, grid, num_colors, split) for _ in range(num_images)]
    drawn = [draw_scene(scene, rng, cell_pixels) for scene in scenes]
    pixels = image_processor(drawn, return_tensors="pt")["pixel_values"]
    return scenes, pixels.flatten(0, -4)  # no tile dimension


def patch_data(
    image_processor: Any,
    side: int,
    grid: int,
    num_colors: int,
    cell_pixels: int,
    num_images: int,
    split: str,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels `[B, 3, S, S]` and, per patch of `side * side`, the class of the cell its centre lies in
    `[B, N]`."""
    world = (grid, num_colors, cell_pixels)
    scenes, pixels = draw_patches(image_processor, *world, num_images, split, seed)
    cells = torch.tensor([_patch_classes(scene, side) for scene in scenes])
    return pixels, cells


def _patch_classes(scene: Scene, side: int) -> list[int]:
    """Index into `CELL_CLASSES` for each of `side * side` patches, row by row."""
    rows = [int((patch + 0.5) * scene.grid / side) for patch in range(side)]
    return [CELL_CLASSES.index(scene.names[row * scene.grid + column]) for row in rows for column in rows]
