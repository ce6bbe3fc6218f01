"""Videos of the gridworld: frames of 2 x 2 cells, each filled as an image of the image world is.

A **story** runs four tracks side by side, one cell of a frame for each:

    digits   3 to 5 different handwritten digits, one after the other
    shapes   3 or 4 coloured shapes, one after the other
    mover    one coloured shape that visits all four cells, each once
    still    one coloured shape that is there throughout

No two shapes of a story have one colour.

         0s          1s          2s          3s
      [ R | 3 ]   [ R | 3 ]   [ 1 | R ]   [ s | 1 ]      R the mover, s still, G then B the shapes
      [ s | G ]   [ s | G ]   [ B | s ]   [ B | R ]

What a track shows takes a run of frames, whose lengths are exchangeable and independent of what is shown: how
long a thing is seen says nothing about its place in the order. Frames between two changes are one picture (a
**state**), stored once. In a **needle** video one frame holds a digit and no other does; its other frames
come from a pool that all needle videos of a split share.

Shapes: `T` frames, four cells of `P` pixels a side, frames of `2P x 2P` RGB.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from voco_plugin.gridworld.scenes import (
    COLORS,
    DIGITS,
    SHAPES,
    Scene,
    Thing,
    cell_name,
    digit_samples,
    in_split,
)

GRID = 2
CELLS = GRID * GRID
_MAX_TRIES = 5000


@dataclass(frozen=True)
class Track:
    """What is shown one after the other: `things`, and per thing the first frame and the one after the last.

    `cells`: where each is, for the mover.
    """

    things: tuple[Thing, ...]
    spans: tuple[tuple[int, int], ...]
    cells: tuple[int, ...] = ()

    def at(self, frame: int) -> int:
        """Which of `things` is shown in `frame`."""
        return next(i for i, (start, end) in enumerate(self.spans) if start <= frame < end)


@dataclass(frozen=True)
class Video:
    """A video: its pictures, and which of them each frame shows.

    Attributes:
        states: the different pictures, in the order of their first frame.
        frames: per frame an index into `states`.
        seconds: time between two frames; the first is at 0.
        digits, shapes, mover, still: the tracks of a story. A needle video has `digits` alone, one thing
            of one frame, with its cell.
    """

    states: tuple[Scene, ...]
    frames: tuple[int, ...]
    seconds: float
    digits: Track
    shapes: Track | None = None
    mover: Track | None = None
    still: Thing | None = None

    @property
    def middle(self) -> int:
        """The frame that a reader of a single frame gets."""
        return len(self.frames) // 2

    def scene(self, frame: int) -> Scene:
        return self.states[self.frames[frame]]


def sample_story(
    rng: np.random.Generator, num_frames: int, num_colors: int, split: str, seconds: float
) -> Video:
    """Draws a story of `num_frames` frames; every frame's combination of things belongs to `split`.

    How many things and when is drawn once; what they are is drawn again until the split allows it, so the two
    splits differ in nothing else.
    """
    num_digits, num_shapes = int(rng.integers(3, 6)), int(rng.integers(3, num_colors - 1))
    digit_spans, shape_spans, mover_spans = (_spans(rng, num_frames, n) for n in (num_digits, num_shapes, 4))
    changes = sorted({start for spans in (digit_spans, shape_spans, mover_spans) for start, _ in spans})
    for _ in range(_MAX_TRIES):
        values = [DIGITS[int(i)] for i in rng.choice(len(DIGITS), num_digits, replace=False)]
        digits = Track(tuple(_digit(rng, value, split) for value in values), digit_spans)
        colors = [tuple(COLORS)[int(i)] for i in rng.choice(num_colors, num_shapes + 2, replace=False)]
        things = [Thing(color=color, shape=SHAPES[int(rng.integers(len(SHAPES)))]) for color in colors]
        shapes = Track(tuple(things[2:]), shape_spans)
        path = tuple(int(i) for i in rng.permutation(CELLS))
        mover = Track((things[0],) * 4, mover_spans, path)
        states = []
        for frame in changes:
            others = (digits.things[digits.at(frame)], shapes.things[shapes.at(frame)], things[1])
            scene = _arranged(rng, things[0], path[mover.at(frame)], others, split)
            if scene is None:
                break
            states.append(scene)
        if len(states) == len(changes):
            frames = tuple(int(np.searchsorted(changes, frame, "right")) - 1 for frame in range(num_frames))
            return Video(tuple(states), frames, seconds, digits, shapes, mover, things[1])
    raise AssertionError(f"no story of this split in {_MAX_TRIES} draws")


def sample_needle(
    rng: np.random.Generator,
    num_frames: int,
    num_colors: int,
    split: str,
    seconds: float,
    pool: tuple[Scene, ...],
) -> Video:
    """Draws a needle video: pictures of `pool`, and the one with the digit anywhere but in the middle.

    The digit's picture is the last of `states`; before it the whole pool.
    """
    place = int(rng.integers(num_frames - 1))
    place += place >= num_frames // 2
    frames = [int(rng.integers(len(pool)))]
    for _ in range(num_frames - 1):  # never the same picture twice in a row
        frames.append((frames[-1] + 1 + int(rng.integers(len(pool) - 1))) % len(pool))
    frames[place] = len(pool)
    for _ in range(_MAX_TRIES):
        digit = _digit(rng, DIGITS[int(rng.integers(len(DIGITS)))], split)
        cell = int(rng.integers(CELLS))
        things = [_shape(rng, num_colors) for _ in range(CELLS)]
        things[cell] = digit
        scene = Scene(GRID, tuple(things))
        if in_split(scene.names, split):
            track = Track((digit,), ((place, place + 1),), (cell,))
            return Video((*pool, scene), tuple(frames), seconds, track)
    raise AssertionError(f"no needle of this split in {_MAX_TRIES} draws")


def sample_pool(rng: np.random.Generator, size: int, num_colors: int, split: str) -> tuple[Scene, ...]:
    """Draws `size` different scenes of four shapes each, of `split`."""
    found: dict[tuple[str, ...], Scene] = {}
    for _ in range(_MAX_TRIES * size):
        scene = Scene(GRID, tuple(_shape(rng, num_colors) for _ in range(CELLS)))
        if in_split(scene.names, split):
            found.setdefault(scene.names, scene)
            if len(found) == size:
                return tuple(found.values())
    raise ValueError(
        f"pool={size} is more than the {len(found)} different frames of {num_colors} colours: give fewer"
    )


def _spans(rng: np.random.Generator, num_frames: int, parts: int) -> tuple[tuple[int, int], ...]:
    """`num_frames` cut into `parts` runs of at least one frame; every way to cut is as likely."""
    cuts = sorted(int(cut) + 1 for cut in rng.choice(num_frames - 1, parts - 1, replace=False))
    return tuple(zip([0, *cuts], [*cuts, num_frames], strict=True))


def _digit(rng: np.random.Generator, value: int, split: str) -> Thing:
    samples = digit_samples(split, value)
    return Thing(digit=value, sample=samples[int(rng.integers(len(samples)))])


def _shape(rng: np.random.Generator, num_colors: int) -> Thing:
    color = tuple(COLORS)[int(rng.integers(num_colors))]
    return Thing(color=color, shape=SHAPES[int(rng.integers(len(SHAPES)))])


def _arranged(
    rng: np.random.Generator, mover: Thing, cell: int, others: tuple[Thing, ...], split: str
) -> Scene | None:
    """The mover in its cell, the others in any order that `split` allows; None where it allows none."""
    allowed = []
    for order in permutations(others):
        things = [*order[:cell], mover, *order[cell:]]
        scene = Scene(GRID, tuple(things))
        if in_split(scene.names, split):
            allowed.append(scene)
    return allowed[int(rng.integers(len(allowed)))] if allowed else None


CELL_NAMES = tuple(cell_name(index // GRID, index % GRID) for index in range(CELLS))
