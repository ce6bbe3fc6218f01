"""Canvases to train and measure a picture tower on: pixels, and what each of their tokens is to tell.

Training canvases are fuller than a data set's, and each drawing on them is changed at random
(`drawing_changes`). They show the training vendors' drawings of the training names alone.

Shapes: `B` canvases, `S` pictures on one, `T` tokens (64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from voco_plugin.gridworld.pictures.drawing_changes import changed
from voco_plugin.gridworld.pictures.lite0_weights import MEAN, STD
from voco_plugin.gridworld.pictures.picture_dataset import SPLITS, Sources
from voco_plugin.gridworld.pictures.picture_scenes import (
    GRID,
    LARGEST,
    PLACES,
    SIDE,
    SMALLEST,
    PictureScene,
    Shown,
    paint,
    paint_background,
    sample_background,
    sample_scene,
)

TOKENS = 8
"""Tokens a side."""
STRIDE = SIDE // TOKENS
NOTHING = -1
IGNORED = -100


@dataclass
class Canvases:
    """Painted canvases with what they show.

    Attributes:
        pixels: `(B, 3, 256, 256)`, scaled as the tower reads them.
        squares: `(B, S, T)`, the share of each token in the mean over a picture's square; zeros where a
            canvas has fewer pictures than `S`.
        cells: `(B, S, T)`, the same over the picture's cell.
        names: `(B, S)`, index of the name, `-100` where there is no picture.
        kinds: `(B, S)`, of its kind.
        tokens: `(B, T)`, index of the name that fills at least half of the token, `-1` where no picture
            touches it, `-100` elsewhere.
    """

    pixels: torch.Tensor
    squares: torch.Tensor
    cells: torch.Tensor
    names: torch.Tensor
    kinds: torch.Tensor
    tokens: torch.Tensor


class Classes:
    """The names and kinds that the heads tell apart, and how canvases of them are made."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.names = {name.text: index for index, name in enumerate(sources.known())}
        self.kinds = {kind: i for i, kind in enumerate(dict.fromkeys(n.kind for n in sources.names))}
        self.by_text = {name.text: name for name in sources.names}

    def test(self, split: str, number: int, seed: int) -> Canvases:
        """Canvases as a data set's split has them, other scenes than its own."""
        names, draw, _ = self.sources.of_split(split)
        rng = np.random.default_rng([seed, 100 + SPLITS.index(split)])
        scenes = [sample_scene(rng, names, draw, "test" if split == "test" else None) for _ in range(number)]
        return self._of(scenes, [paint(scene, self.sources.vendors, self.by_text) for scene in scenes])

    def training(self, number: int, rng: np.random.Generator) -> Canvases:
        """Full canvases of changed drawings: every name and vendor as likely."""
        known, draw, _ = self.sources.of_split("train")
        scenes, images = [], []
        for _ in range(number):
            cells = sorted(rng.permutation(len(PLACES))[: int(rng.integers(6, len(PLACES) + 1))].tolist())
            background = sample_background(rng)
            canvas = paint_background(background)
            shown = []
            for cell in cells:
                name = known[int(rng.integers(len(known)))]
                label = draw[name.text][int(rng.integers(len(draw[name.text])))]
                size = int(rng.integers(SMALLEST, LARGEST + 1))
                left, top = (
                    int(rng.integers(i * SIDE // GRID, (i + 1) * SIDE // GRID - size + 1))
                    for i in (cell % GRID, cell // GRID)
                )
                drawing = changed(self.sources.drawn[label].draw(name), size, rng)
                canvas.paste(drawing, (left, top), drawing)
                shown.append(Shown(cell, name.text, name.kind, label, left, top, size))
            scenes.append(PictureScene(tuple(shown), background))
            images.append(canvas)
        return self._of(scenes, images)

    def _of(self, scenes: Sequence[PictureScene], images: Sequence[Image.Image]) -> Canvases:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        most = max(len(scene.shown) for scene in scenes)
        shape = (len(scenes), most)
        squares, cells = (torch.zeros(*shape, TOKENS * TOKENS) for _ in range(2))
        names, kinds = (torch.full(shape, IGNORED) for _ in range(2))
        tokens = torch.full((len(scenes), TOKENS * TOKENS), NOTHING)
        for row, scene in enumerate(scenes):
            for column, thing in enumerate(scene.shown):
                covered = _covered(thing.left, thing.top, thing.size, thing.size)
                squares[row, column] = covered / covered.sum()
                edge = SIDE / GRID
                cell = _covered(thing.column * edge, thing.row * edge, edge, edge)
                cells[row, column] = cell / cell.sum()
                names[row, column] = self.names.get(thing.name, IGNORED)
                kinds[row, column] = self.kinds[thing.kind]
                tokens[row][covered > 0] = IGNORED
                tokens[row][covered >= 0.5] = self.names.get(thing.name, IGNORED)
        scaled = (pixels.float() / 255 - mean) / std
        return Canvases(scaled, squares, cells, names, kinds, tokens)


def _covered(left: float, top: float, width: float, height: float) -> torch.Tensor:
    """Which share of each token, `(T,)`, a rectangle covers, 0…1."""
    edges = torch.arange(TOKENS + 1) * float(STRIDE)

    def along(start: float, length: float) -> torch.Tensor:
        return (edges[1:].clamp(max=start + length) - edges[:-1].clamp(min=start)).clamp(min=0) / STRIDE

    return (along(top, height)[:, None] * along(left, width)[None]).flatten()
