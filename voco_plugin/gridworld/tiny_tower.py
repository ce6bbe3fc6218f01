"""Pre-training of the tiny VLM's vision tower: for each patch, what its cell holds and where the patch is.

This stands for what CLIP already knows when LLaVA starts. The tower's features for an image, and the labels
of its patches, also serve the alignment (`tiny_align`) and the encoders of other libraries (`tiny_parts`).

Shapes: `B` images, `S` pixels a side, `N` patches an image, `D` tower width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from voco_plugin.gridworld.scenes import COLORS, SHAPES, SPLITS, Scene, draw_scene, sample_scene

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

INIT_STD = 0.02
CELL_CLASSES: tuple[str, ...] = (
    *(f"{color} {shape}" for color in COLORS for shape in SHAPES),
    *(f"digit {digit}" for digit in range(10)),
)


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
    """Train the tower, in place, to tell for each patch what its cell holds and where the patch is.

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
    vision: Any = model.config.vision_config
    side = vision.image_size // processor.patch_size
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
