"""Pictures of noise."""

from __future__ import annotations

import torch
from PIL import Image


def pictures(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Image.fromarray(torch.randint(0, 255, (24, 24, 3), generator=generator, dtype=torch.uint8).numpy())
        for _ in range(count)
    ]
