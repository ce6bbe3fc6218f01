"""Scenes of named pictures: one to nine of them in the cells of a 3 x 3 layout, drawn on one canvas.

    top left    | top middle    | top right
    middle left | middle        | middle right       reading order: row by row, from the top left
    bottom left | bottom middle | bottom right

A scene is sampled from a seed first (what, where, whose drawing, how large, which background) and painted
afterwards; a sampled scene can be painted without randomness. Sampling uses whole numbers only, so that a
seed gives the same scenes on any machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image

from voco_plugin.gridworld.pictures.drawings import Vendor
from voco_plugin.gridworld.pictures.vocabulary import Name

SIDE = 256
"""Pixels a side of the canvas."""
PLACES: tuple[str, ...] = (
    "top left", "top middle", "top right", "middle left", "middle", "middle right", "bottom left",
    "bottom middle", "bottom right",
)  # fmt: skip
GRID = 3
_EDGES = tuple(round(i * SIDE / GRID) for i in range(GRID + 1))
SMALLEST, LARGEST = 44, 80
"""Pixels a side of a picture."""
MAX_KINDS = 4
"""A scene's pictures are of so many kinds at most, so that counting has something to count."""
# of 100 pictures, so many show a thing that the scene already shows
_REPEATS = 12
# one combination of things and places in five belongs to the test split
_TEST_EVERY = 5
_MAX_TRIES = 1000


@dataclass(frozen=True)
class Shown:
    """One picture of a scene.

    Attributes:
        cell: 0…8, in reading order.
        name, kind: of the thing.
        vendor: the label of whose drawing it is.
        left, top, size: pixels; the square it is drawn in lies within its cell.
    """

    cell: int
    name: str
    kind: str
    vendor: str
    left: int
    top: int
    size: int

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Background:
    """What lies behind: `plain` (the first colour), `across`, `down` (from the first colour to the second) or
    `noise` (a soft mix of both, from `seed`)."""

    style: str
    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    seed: int


@dataclass(frozen=True)
class PictureScene:
    """Pictures in reading order, and what lies behind them."""

    shown: tuple[Shown, ...]
    background: Background

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.shown)

    def once(self) -> list[Shown]:
        """The pictures whose thing the scene shows once."""
        return [thing for thing in self.shown if self.names.count(thing.name) == 1]

    def as_json(self) -> dict[str, Any]:
        """The scene as plain data: place to what is there."""
        places = {}
        for thing in self.shown:
            box = [thing.left, thing.top, thing.left + thing.size, thing.top + thing.size]
            places[thing.place] = {"name": thing.name, "kind": thing.kind, "vendor": thing.vendor, "box": box}
        return {"background": self.background.style, "places": places}


def in_split(scene: PictureScene, split: str) -> bool:
    """Whether this combination of things and places belongs to `train` or `test`; none is in both."""
    said = "|".join(f"{thing.cell} {thing.name}" for thing in scene.shown)
    return (zlib.crc32(said.encode()) % _TEST_EVERY == 0) == (split == "test")


def sample_scene(
    rng: np.random.Generator,
    names: Sequence[Name],
    vendors: Mapping[str, Sequence[str]],
    split: str | None = None,
) -> PictureScene:
    """Draws a scene of one to nine pictures, every number as likely.

    Args:
        rng: its state is all that the scene depends on.
        names: what it may show. A kind comes as often as the square root of its number of names says.
        vendors: a name's text → labels of those who draw it; a picture is of any, each as likely.
        split: `train` or `test`: only combinations that belong to it; `None`: any.
    """
    by_kind: dict[str, list[Name]] = {}
    for name in names:
        by_kind.setdefault(name.kind, []).append(name)
    for _ in range(_MAX_TRIES):
        scene = _sample(rng, by_kind, vendors)
        if split is None or in_split(scene, split):
            return scene
    raise AssertionError("no scene of this split in a thousand draws")


def kind_weights(by_kind: Mapping[str, Sequence[Name]]) -> dict[str, int]:
    """How often a kind comes, in whole numbers."""
    return {kind: isqrt(10_000 * len(listed)) for kind, listed in by_kind.items()}


def _sample(
    rng: np.random.Generator, by_kind: Mapping[str, list[Name]], vendors: Mapping[str, Sequence[str]]
) -> PictureScene:
    number = int(rng.integers(1, len(PLACES) + 1))
    cells = sorted(int(cell) for cell in rng.permutation(len(PLACES))[:number])
    weights = kind_weights(by_kind)
    kinds: list[str] = []
    for _ in range(int(rng.integers(1, min(MAX_KINDS, number, len(weights)) + 1))):
        kinds.append(weighted(rng, {kind: w for kind, w in weights.items() if kind not in kinds}))
    chosen: list[Name] = []
    for position in range(number):
        # each kind once, so that all are there; then any
        kind = kinds[position] if position < len(kinds) else kinds[int(rng.integers(len(kinds)))]
        fresh = [name for name in by_kind[kind] if name not in chosen]
        if chosen and (not fresh or (position >= len(kinds) and int(rng.integers(100)) < _REPEATS)):
            chosen.append(chosen[int(rng.integers(len(chosen)))])
        else:
            chosen.append(fresh[int(rng.integers(len(fresh)))])
    order = rng.permutation(number)
    shown = []
    for cell, index in zip(cells, order, strict=True):
        size = int(rng.integers(SMALLEST, LARGEST + 1))
        left = _within(rng, cell % GRID, size)
        top = _within(rng, cell // GRID, size)
        name = chosen[int(index)]
        labels = vendors[name.text]
        vendor = labels[int(rng.integers(len(labels)))]
        shown.append(Shown(cell, name.text, name.kind, vendor, left, top, size))
    return PictureScene(tuple(shown), sample_background(rng))


def _within(rng: np.random.Generator, index: int, size: int) -> int:
    low, high = _EDGES[index], _EDGES[index + 1] - size
    return int(rng.integers(low, high + 1))


def weighted(rng: np.random.Generator, weights: Mapping[str, int]) -> str:
    """One of the keys, as likely as its weight says."""
    at = int(rng.integers(sum(weights.values())))
    for key, weight in weights.items():
        at -= weight
        if at < 0:
            return key
    raise AssertionError("weights do not add up")


def sample_background(rng: np.random.Generator) -> Background:
    """A light background, one in eight a dark one."""
    low, high = (24, 96) if int(rng.integers(8)) == 0 else (120, 256)
    styles = ("plain", "across", "down", "noise")
    style = styles[int(rng.integers(len(styles)))]
    first, second = (tuple(int(level) for level in rng.integers(low, high, 3)) for _ in range(2))
    return Background(style, (first, second), int(rng.integers(2**31)))  # type: ignore[arg-type]


def paint_background(background: Background) -> Image.Image:
    """The empty canvas, RGB."""
    first, second = (np.array(color, dtype=np.int64) for color in background.colors)
    if background.style == "plain":
        return Image.new("RGB", (SIDE, SIDE), background.colors[0])
    if background.style == "noise":
        coarse = np.random.default_rng(background.seed).integers(0, 256, (8, 8), dtype=np.uint8)
        share = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        share = 64 + share.astype(np.int64) // 2  # never quite one of the two
    else:
        ramp = np.arange(SIDE, dtype=np.int64) * 255 // (SIDE - 1)
        share = np.broadcast_to(ramp[None] if background.style == "across" else ramp[:, None], (SIDE, SIDE))
    mixed = (first * (255 - share[..., None]) + second * share[..., None]) // 255
    return Image.fromarray(mixed.astype(np.uint8))


def paint(scene: PictureScene, vendors: Mapping[str, Vendor], names: Mapping[str, Name]) -> Image.Image:
    """The scene as an RGB picture of `SIDE x SIDE` pixels.

    Args:
        scene: what to paint.
        vendors: label → whose drawings.
        names: text → the name.
    """
    canvas = paint_background(scene.background)
    for thing in scene.shown:
        drawing = vendors[thing.vendor].draw(names[thing.name])
        drawing = drawing.resize((thing.size, thing.size), Image.Resampling.BICUBIC)
        canvas.paste(drawing, (thing.left, thing.top), drawing)
    return canvas
