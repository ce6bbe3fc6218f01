"""A tiny random VLM whose answers depend on what it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm


def save_loud_vlm(folder: Path, **options: Any) -> None:
    """Save one into `folder`, its weights ten times as wide as usual: at 0.02 every prompt reads the same.

    Args:
        options: of `build_tiny_vlm`, besides the sizes.
    """
    model, processor = build_tiny_vlm(
        image_size=32, patch_size=8, vision_width=32, vision_layers=2, text_width=32, text_layers=2,
        text_heads=2, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
