"""Scenes of the gridworld: a grid whose cells hold coloured shapes or real handwritten digits.

A scene is sampled from a seed, named in words, and drawn. Cells are named like a chessboard read from the top
left: column letter, then row number.

        a    b
    1 [ a1 | b1 ]      row-major order: a1, b1, a2, b2
    2 [ a2 | b2 ]

Shapes: `G` cells per side, `P` pixels per cell; an image is `G*P x G*P` RGB.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (226, 52, 52),
    "green": (62, 188, 78),
    "blue": (64, 112, 240),
    "yellow": (240, 212, 56),
    "purple": (160, 74, 200),
    "orange": (246, 142, 40),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
SPLITS: tuple[str, ...] = ("train", "test")

# 0 to 4 keep the tiny LLM's task small (docs/decisions.md)
DIGITS = (0, 1, 2, 3, 4)
# One digit image, and one combination of things, in five belongs to the test split.
_TEST_EVERY = 5
_MAX_TRIES = 1000
# of 255: less ink than this cannot be seen, and is in no box (the edge of a shape has 16 or more)
_VISIBLE = 12


@dataclass(frozen=True)
class Thing:
    """What one cell holds: a coloured shape, or a digit and its index `sample` in `load_digits`.

    `box` is where its pixels are, once the scene is placed: left, top, right and bottom edge in pixels, the
    last two just outside.
    """

    color: str | None = None
    shape: str | None = None
    digit: int | None = None
    sample: int | None = None
    box: tuple[int, int, int, int] | None = None

    @property
    def is_digit(self) -> bool:
        return self.digit is not None

    @property
    def name(self) -> str:
        """In words, as questions and answers use it: `red circle`, `digit 7`."""
        return f"digit {self.digit}" if self.is_digit else f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """`grid` cells per side and the things in them, in row-major order (`grid * grid` of them).

    `side` is the image's, in pixels, once the scene is placed.
    """

    grid: int
    things: tuple[Thing, ...]
    side: int | None = None

    def row(self, index: int) -> int:
        """Row of cell `index`, from the top, in cells."""
        return index // self.grid

    def column(self, index: int) -> int:
        """Column of cell `index`, from the left, in cells."""
        return index % self.grid

    def cell_name(self, index: int) -> str:
        return cell_name(self.row(index), self.column(index))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.things)

    def as_json(self) -> dict[str, Any]:
        """The scene as plain data: cell name to the thing's fields (those that apply)."""
        cells = {}
        for index, thing in enumerate(self.things):
            fields = {k: v for k, v in vars(thing).items() if v is not None}
            cells[self.cell_name(index)] = fields
        placed = {} if self.side is None else {"side": self.side}
        return {"grid": self.grid, **placed, "cells": cells}


def cell_name(row: int, column: int) -> str:
    """`(0, 0)` is a1, `(0, 1)` is b1, `(1, 0)` is a2."""
    return f"{chr(ord('a') + column)}{row + 1}"


@lru_cache(maxsize=1)
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits of scikit-learn: images `(1797, 8, 8)` with ink 0…16, and labels `(1797,)`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'gridworld needs scikit-learn for its digits: pip install "voco_plugin[quickstart]"'
        ) from error
    data = load_digits()
    return data.images, data.target


@lru_cache(maxsize=64)
def digit_samples(split: str, digit: int) -> tuple[int, ...]:
    """Indices into `digit_images()` of one digit that `split` may draw; the two splits share none."""
    _, labels = digit_images()
    held_out = split == "test"
    return tuple(int(i) for i in np.flatnonzero(labels == digit) if (i % _TEST_EVERY == 0) == held_out)


def in_split(names: tuple[str, ...], split: str) -> bool:
    """Whether this combination of things belongs to `split`; none is in both, whatever their sizes."""
    return (zlib.crc32("|".join(names).encode()) % _TEST_EVERY == 0) == (split == "test")


def sample_scene(rng: np.random.Generator, grid: int, num_colors: int, split: str) -> Scene:
    """Draws a scene: between one and all but one of its cells hold digits, the others shapes."""
    colors = tuple(COLORS)[:num_colors]
    cells = grid * grid
    for _ in range(_MAX_TRIES):
        num_digits = int(rng.integers(1, cells))
        is_digit = rng.permutation(cells) < num_digits
        things = []
        for flag in is_digit:
            if flag:
                digit = DIGITS[int(rng.integers(len(DIGITS)))]
                samples = digit_samples(split, digit)
                things.append(Thing(digit=digit, sample=samples[int(rng.integers(len(samples)))]))
            else:
                color = colors[int(rng.integers(num_colors))]
                things.append(Thing(color=color, shape=SHAPES[int(rng.integers(len(SHAPES)))]))
        scene = Scene(grid, tuple(things))
        if in_split(scene.names, split):
            return scene
    raise AssertionError("no scene of this split in a thousand draws")


@dataclass(frozen=True)
class Placement:
    """How a scene is drawn: the background's `shade`, and per thing the left and top edge and the side of the
    square it is drawn in, in pixels, and its ink."""

    shade: int
    squares: tuple[tuple[int, int, int], ...]
    inks: tuple[tuple[int, int, int], ...]


def draw_scene(scene: Scene, rng: np.random.Generator, cell_pixels: int) -> Image.Image:
    """Draws the scene as RGB, `grid * cell_pixels` pixels a side; `rng` varies sizes and places."""
    return paint(scene, sample_placement(scene, rng, cell_pixels), cell_pixels)


def sample_placement(scene: Scene, rng: np.random.Generator, cell_pixels: int) -> Placement:
    """Draws sizes, places within the cells, and brightness."""
    shade = int(rng.integers(16, 48))
    squares, inks = [], []
    for index, thing in enumerate(scene.things):
        size = int(round(cell_pixels * rng.uniform(0.62, 0.84)))
        slack = cell_pixels - size
        left = scene.column(index) * cell_pixels + int(rng.integers(slack + 1))
        top = scene.row(index) * cell_pixels + int(rng.integers(slack + 1))
        squares.append((left, top, size))
        if thing.color is None:
            inks.append((235, 235, 235))
        else:
            brightness = rng.uniform(0.85, 1.0)
            red, green, blue = (int(level * brightness) for level in COLORS[thing.color])
            inks.append((red, green, blue))
    return Placement(shade, tuple(squares), tuple(inks))


def paint(scene: Scene, placement: Placement, cell_pixels: int) -> Image.Image:
    """The picture of a scene so placed."""
    side = scene.grid * cell_pixels
    image = Image.new("RGB", (side, side), (placement.shade,) * 3)
    for thing, (left, top, size), ink in zip(scene.things, placement.squares, placement.inks, strict=True):
        image.paste(ink, (left, top), _mask(thing, size))
    return image


def place(scene: Scene, placement: Placement, cell_pixels: int) -> Scene:
    """The scene with `side`, and the `box` of each thing: the smallest that holds all of its visible ink."""
    things = []
    for thing, (left, top, size) in zip(scene.things, placement.squares, strict=True):
        x0, y0, x1, y1 = _ink_box(_mask(thing, size))
        things.append(replace(thing, box=(left + x0, top + y0, left + x1, top + y1)))
    return Scene(scene.grid, tuple(things), scene.grid * cell_pixels)


def _ink_box(mask: Image.Image) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(np.asarray(mask) >= _VISIBLE)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _mask(thing: Thing, size: int) -> Image.Image:
    """Coverage of the thing over `size x size` pixels, 0…255."""
    return _digit_mask(thing, size) if thing.color is None else _shape_mask(str(thing.shape), size)


def _digit_mask(thing: Thing, size: int) -> Image.Image:
    """Ink of the handwritten digit, 8 x 8 pixels enlarged to `size x size`."""
    images, _ = digit_images()
    ink = np.clip(images[thing.sample] * (255.0 / 16.0), 0, 255).astype(np.uint8)
    return Image.fromarray(ink).resize((size, size), Image.Resampling.BILINEAR)


@lru_cache(maxsize=512)
def _shape_mask(shape: str, size: int) -> Image.Image:
    """Coverage of the shape over `size x size` pixels, 0…255."""
    big = size * 4  # drawn four times as large, then reduced: smooth edges
    mask = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif shape == "square":
        inset = big // 12
        pen.rectangle((inset, inset, big - 1 - inset, big - 1 - inset), fill=255)
    else:
        pen.polygon([(big // 2, 0), (big - 1, big - 1), (0, big - 1)], fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)
