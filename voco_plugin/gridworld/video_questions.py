"""Questions about a gridworld video, with exact answers of one word; each needs more than one frame.

    type          question                             answer    needs
    first         First of 3 and 1                     3         order
    before        Is red before blue                   yes | no  order
    next          Digit after 3 | Digit before 3       1         order
    where         Cell of red at end | at start        b2        order
    at            Digit at <5.0s> | Cell of red at <5.0s>    4 | a1    order
    count         Count circles | Count digits         3         every frame
    needle        Which digit                          4         every frame (needle videos)
    needle_cell   Cell of digit                        b1        every frame
    needle_half   Is digit before <8.0s>               yes | no  order

As in the image questions of the set `terse`: a question ends with what its answer turns on, and one word
names a thing, here its colour, which no other thing of a story has.

`before` and `first` compare things of one track, which are never seen together. `count` counts different
things, seen in any frame; `at` never asks for what the middle frame shows; a thing's time is written as the
time text before its frame is, whether or not the prompt holds time texts.

Balanced: of two things named the first is right half of the time; `next`, `where` and `at` draw what is asked
for evenly over what the video shows; `count` draws its answer before it draws what to count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from voco_plugin.data.conversations import time_text
from voco_plugin.gridworld.questions import pick
from voco_plugin.gridworld.scenes import SHAPES, Thing
from voco_plugin.gridworld.video_scenes import CELL_NAMES, Track, Video

ORDER_TYPES = ("first", "before", "next", "where", "at", "needle_half")
"""Types whose answer turns on the order of the frames."""


@dataclass(frozen=True)
class VideoTurn:
    """One question with its exact answer.

    `names`: the things it speaks of; `word`: what else it turns on (`after`, `end`, …).
    """

    type: str
    question: str
    answer: str
    names: tuple[str, ...] = ()
    word: str = ""


VideoQuestion = Callable[[Video, np.random.Generator], VideoTurn]
"""Draws a question about a video."""


def _track(track: Track | None) -> Track:
    assert track is not None, "a story has every track"
    return track


def _pair(rng: np.random.Generator, number: int) -> tuple[int, int]:
    """Two places in the order, the earlier one first."""
    i, j = sorted(int(k) for k in rng.choice(number, 2, replace=False))
    return i, j


def _first(video: Video, rng: np.random.Generator) -> VideoTurn:
    i, j = _pair(rng, len(video.digits.things))
    answer = str(video.digits.things[i].digit)
    names = (answer, str(video.digits.things[j].digit))
    names = names if rng.random() < 0.5 else names[::-1]
    return VideoTurn("first", f"First of {names[0]} and {names[1]}", answer, names)


def _before(video: Video, rng: np.random.Generator) -> VideoTurn:
    things = _track(video.shapes).things
    i, j = _pair(rng, len(things))
    pair, answer = (things[i], things[j]), "yes"
    if rng.random() < 0.5:
        pair, answer = pair[::-1], "no"
    asked = f"Is {pair[0].color} before {pair[1].color}"
    return VideoTurn("before", asked, answer, (pair[0].name, pair[1].name))


def _next(video: Video, rng: np.random.Generator) -> VideoTurn:
    digits = [str(thing.digit) for thing in video.digits.things]
    k = int(rng.integers(len(digits) - 1))
    word, named, answer = pick(
        rng, [("after", digits[k], digits[k + 1]), ("before", digits[k + 1], digits[k])]
    )
    return VideoTurn("next", f"Digit {word} {named}", answer, (named,), word)


def _where(video: Video, rng: np.random.Generator) -> VideoTurn:
    mover = _track(video.mover)
    word, cell = pick(rng, [("start", mover.cells[0]), ("end", mover.cells[-1])])
    thing = mover.things[0]
    return VideoTurn("where", f"Cell of {thing.color} at {word}", CELL_NAMES[cell], (thing.name,), word)


def _at(video: Video, rng: np.random.Generator) -> VideoTurn:
    track = pick(rng, [video.digits, _track(video.mover)])
    k = pick(rng, [i for i in range(len(track.spans)) if i != track.at(video.middle)])
    when = time_text(video.seconds * int(rng.integers(*track.spans[k])))
    if track is video.digits:
        return VideoTurn("at", f"Digit at {when}", str(track.things[k].digit), (), "digit")
    thing = track.things[0]
    asked = f"Cell of {thing.color} at {when}"
    return VideoTurn("at", asked, CELL_NAMES[track.cells[k]], (thing.name,), "cell")


def _has_shape(shape: str, thing: Thing) -> bool:
    return thing.shape == shape


def shown(video: Video) -> list[Thing]:
    """The different things that a story shows."""
    still = [] if video.still is None else [video.still]
    return [*video.digits.things, *_track(video.shapes).things, _track(video.mover).things[0], *still]


SUBJECTS: dict[str, Callable[[Thing], bool]] = {
    "digits": lambda thing: thing.is_digit,
    **{f"{shape}s": partial(_has_shape, shape) for shape in SHAPES},
}
"""What `count` counts: how the question calls it, and which things are such."""


def _count(video: Video, rng: np.random.Generator) -> VideoTurn:
    things = shown(video)
    counts = {name: sum(map(fits, things)) for name, fits in SUBJECTS.items()}
    number = pick(rng, sorted(set(counts.values())))
    subject = pick(rng, [name for name, count in counts.items() if count == number])
    return VideoTurn("count", f"Count {subject}", str(number), (), subject)


def _needle(video: Video, rng: np.random.Generator) -> VideoTurn:
    return VideoTurn("needle", "Which digit", str(video.digits.things[0].digit))


def _needle_cell(video: Video, rng: np.random.Generator) -> VideoTurn:
    return VideoTurn("needle_cell", "Cell of digit", CELL_NAMES[video.digits.cells[0]])


def _needle_half(video: Video, rng: np.random.Generator) -> VideoTurn:
    when = time_text(video.seconds * video.middle)
    answer = "yes" if video.digits.spans[0][0] < video.middle else "no"
    return VideoTurn("needle_half", f"Is digit before {when}", answer)


PLOTS: dict[str, dict[str, VideoQuestion]] = {
    "story": {
        "first": _first, "before": _before, "next": _next, "where": _where, "at": _at, "count": _count,
    },
    "needle": {"needle": _needle, "needle_cell": _needle_cell, "needle_half": _needle_half},
}  # fmt: skip
"""Per kind of video its question types."""


def ask_video(video: Video, rng: np.random.Generator, num_questions: int, plot: str) -> list[VideoTurn]:
    """Draws `num_questions` different questions about one video, going round the types of its plot.

    Raises:
        ValueError: the plot has not that many different questions.
    """
    turns: dict[str, VideoTurn] = {}
    for _ in range(20 * num_questions):
        for kind in rng.permutation(sorted(PLOTS[plot])):
            turn = PLOTS[plot][str(kind)](video, rng)
            turns.setdefault(turn.question, turn)
            if len(turns) == num_questions:
                return list(turns.values())
    raise ValueError(f"a {plot} video has fewer than {num_questions} different questions: ask fewer")
