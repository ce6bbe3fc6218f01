"""Small photos, and caches compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as PILImage

import voco_plugin as vp

COUNT = 7


def write_images(folder: Path, count: int = COUNT, seed: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        values = np.random.default_rng(seed + number).integers(0, 255, (14, 17, 3), dtype=np.uint8)
        PILImage.fromarray(values).save(path)
    return paths


def equal(one: vp.VoCoCache, other: vp.VoCoCache, tolerance: float = 0.0) -> bool:
    (a,), (b,) = one, other
    pairs = list(zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True))
    return all((x - y).abs().max() <= tolerance for x, y in pairs)
