"""Alignment of the tiny VLM: its projector learns to say in the LLM's words what each patch shows.

LLaVA aligns on captions with the LLM frozen, which takes an LLM that can already write. The tiny LLM starts
from random weights, so there is nothing to write with: the projector is fitted to the words' embeddings
themselves. A patch of cell b2 that holds a red circle is to come out as the sum of the embeddings of "red",
"circle" and "b2". Colour, shape, digit and place then reach the LLM equally loud; without this step the
colours drown the shapes, and thousands of steps of instruction tuning stay on that plateau
(docs/decisions.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from voco_plugin.gridworld.scenes import Scene
from voco_plugin.gridworld.tiny_tower import draw_patches, tower_features

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


def align_projector(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    *,
    grid: int = 2,
    num_colors: int = 4,
    cell_pixels: int = 32,
    num_images: int = 6000,
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Fit the projector, in place; tower and LLM stay as they are.

    Args:
        model, processor: as `build_tiny_vlm` made them, the tower pre-trained.
        grid, num_colors, cell_pixels: the gridworld, as for `write_gridworld`.
        num_images: different training images.
        steps, batch_size, learning_rate: of AdamW, under a one-cycle schedule.
        seed: of images and batches.

    Returns:
        `alignment_error`: mean squared distance to the words' sum on held-out scenes and digits, as a share
        of the sum's own variance.
    """
    world = (grid, num_colors, cell_pixels)
    features, target = _pairs(model, processor, *world, num_images, "train", seed)
    held_features, held_target = _pairs(model, processor, *world, 512, "test", seed)
    scale = model.get_input_embeddings().get_parameter("weight").detach().std()
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(features), (batch_size,), generator=generator)
        loss = ((projector(features[rows]) - target[rows]) / scale).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in projector.parameters():
        parameter.grad = None
    with torch.no_grad():
        error = (projector(held_features) - held_target).pow(2).mean() / held_target.var()
    return {"alignment_error": error.item()}


@torch.no_grad()
def _pairs(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    grid: int,
    num_colors: int,
    cell_pixels: int,
    num_images: int,
    split: str,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tower features `[B, N, D]` and, for each, the sum of its words' embeddings `[B, N, H]`."""
    scenes, pixels = draw_patches(
        processor.image_processor, grid, num_colors, cell_pixels, num_images, split, seed
    )
    side = pixels.shape[-1] // processor.patch_size
    embeddings = model.get_input_embeddings().get_parameter("weight")
    known: dict[str, int] = {}
    ids = torch.tensor([_patch_words(scene, side, processor.tokenizer, known) for scene in scenes])
    model.eval()
    features = [tower_features(model, pixels[i : i + 256])[0] for i in range(0, len(pixels), 256)]
    return torch.cat(features), embeddings[ids].sum(-2)


def _patch_words(scene: Scene, side: int, tokenizer: Any, known: dict[str, int]) -> list[list[int]]:
    """Per patch, row by row, the ids of its cell's two content words and its name; ``known`` fills with the
    ids of words, since a tokenizer takes longer than everything else here.
    """
    words = []
    for row in range(side):
        for column in range(side):
            cell = int((row + 0.5) * scene.grid / side) * scene.grid
            cell += int((column + 0.5) * scene.grid / side)
            named = (*scene.names[cell].split(), scene.cell_name(cell))
            known |= {word: _id(word, tokenizer) for word in named if word not in known}
            words.append([known[word] for word in named])
    return words


def _id(word: str, tokenizer: Any) -> int:
    ids = tokenizer(" " + word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens: alignment needs a tokenizer that has it as one")
    return ids[0]
