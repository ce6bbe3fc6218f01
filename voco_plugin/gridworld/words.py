"""Short questions with answers of one word, for studies: the question sets `words` and `terse`.

Nine types, from easy to hard:

    type      words                                  terse                       answer
    only      Colour of the circle?                  Colour of circle            red
    object    Object at b2?                          Object at b2                circle | 4
    colour    Colour at b2?                          Colour at b2                red
    cell      Cell of the 4?                         Cell of 4                   b2
    exists    Any red?                               Any red                     yes | no
    count     How many circles?                      Count circles               3
    count_in  How many red shapes in row 2?          Count red in row 2          1
    relation  Is the circle above the 4?             Is circle above 4           yes | no
    sum       Sum of b1 and c3?                      Sum of b1 and c3            6

Things are named by one word, their shape or their digit, where no other thing of the scene has it: a tiny
base learns to find a thing by one word at once, by two only long after (docs/decisions.md, 2026-11-25).

`terse` takes a third fewer tokens and ends with what the answer turns on. Both ask the same of the same
images: one seed gives the same questions. Answers are balanced as in `questions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from voco_plugin.gridworld.questions import QuestionType, pick
from voco_plugin.gridworld.scenes import DIGITS, SHAPES, Scene, Thing

Asked = tuple[str, str] | None
"""A question and its answer; None where the scene allows none."""


@dataclass(frozen=True)
class Wording:
    """How the types are put into words; `str.format` fills in the braces."""

    of: str
    colored: str
    count: str
    relation: str
    mark: str


_WORDS = Wording("of the {}", "{} shapes", "How many {}", "Is the {} {} the {}", "?")
_TERSE = Wording("of {}", "{}", "Count {}", "Is {} {} {}", "")


def _word(thing: Thing) -> str:
    """A thing's kind in one word: its shape, or the digit's value."""
    return str(thing.digit) if thing.is_digit else str(thing.shape)


def _only(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    shapes = [thing.shape for thing in scene.things]
    single = [thing for thing in scene.things if thing.shape and shapes.count(thing.shape) == 1]
    if not single:
        return None
    thing = pick(rng, single)
    return f"Colour {say.of.format(thing.shape)}{say.mark}", str(thing.color)


def _object(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    index = int(rng.integers(len(scene.things)))
    return f"Object at {scene.cell_name(index)}{say.mark}", _word(scene.things[index])


def _colour(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    index = pick(rng, [i for i, thing in enumerate(scene.things) if not thing.is_digit])
    return f"Colour at {scene.cell_name(index)}{say.mark}", str(scene.things[index].color)


def _named(scene: Scene) -> list[int]:
    """The things that one word names, no other thing being called so."""
    words = [_word(thing) for thing in scene.things]
    return [index for index, word in enumerate(words) if words.count(word) == 1]


def _cell(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    named = _named(scene)
    if not named:
        return None
    index = pick(rng, named)
    return f"Cell {say.of.format(_word(scene.things[index]))}{say.mark}", scene.cell_name(index)


def _exists(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    words = pick(rng, [colors, SHAPES, tuple(str(digit) for digit in DIGITS)])
    held = {_word(thing) for thing in scene.things} | {str(thing.color) for thing in scene.things}
    there, absent = [w for w in words if w in held], [w for w in words if w not in held]
    if not there or not absent:
        return None  # one answer only: a guesser would know it
    word, answer = pick(rng, [(there, "yes"), (absent, "no")])
    return f"Any {pick(rng, word)}{say.mark}", answer


def _subjects(say: Wording, things: Iterable[Thing], colors: tuple[str, ...]) -> list[tuple[str, int]]:
    """What can be counted among `things`, with how many there are."""
    things = list(things)
    counts = [(say.colored.format(color), sum(t.color == color for t in things)) for color in colors]
    counts += [(f"{shape}s", sum(t.shape == shape for t in things)) for shape in SHAPES]
    return [*counts, ("digits", sum(t.is_digit for t in things))]


def _drawn(rng: np.random.Generator, subjects: list[tuple[str, int]]) -> tuple[str, str]:
    """A subject and its number: the number is drawn first, so that large ones are as likely as small ones."""
    number = pick(rng, sorted({count for _, count in subjects}))
    return pick(rng, [name for name, count in subjects if count == number]), str(number)


def _count(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    subject, number = _drawn(rng, _subjects(say, scene.things, colors))
    return f"{say.count.format(subject)}{say.mark}", number


def _count_in(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    line = int(rng.integers(scene.grid))
    place, where = pick(rng, [(scene.row, f"row {line + 1}"), (scene.column, f"column {chr(97 + line)}")])
    inside = [thing for index, thing in enumerate(scene.things) if place(index) == line]
    subject, number = _drawn(rng, _subjects(say, inside, colors))
    return f"{say.count.format(subject)} in {where}{say.mark}", number


def _relation(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    named = _named(scene)
    word, place = pick(rng, [("left of", scene.column), ("above", scene.row)])
    pairs = [(i, j) for i in named for j in named if place(i) < place(j)]
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    answer = "yes"
    if rng.random() < 0.5:
        first, second, answer = second, first, "no"
    left, right = _word(scene.things[first]), _word(scene.things[second])
    return f"{say.relation.format(left, word, right)}{say.mark}", answer


def _sum(say: Wording, scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> Asked:
    digits = [i for i, thing in enumerate(scene.things) if thing.is_digit]
    if len(digits) < 2:
        return None
    i, j = (digits[int(k)] for k in sorted(rng.choice(len(digits), 2, replace=False)))
    total = (scene.things[i].digit or 0) + (scene.things[j].digit or 0)
    return f"Sum of {scene.cell_name(i)} and {scene.cell_name(j)}{say.mark}", str(total)


_TYPES: dict[str, Callable[[Wording, Scene, np.random.Generator, tuple[str, ...]], Asked]] = {
    "only": _only,
    "object": _object,
    "colour": _colour,
    "cell": _cell,
    "exists": _exists,
    "count": _count,
    "count_in": _count_in,
    "relation": _relation,
    "sum": _sum,
}
WORD_TYPES: dict[str, QuestionType] = {name: partial(draw, _WORDS) for name, draw in _TYPES.items()}
TERSE_TYPES: dict[str, QuestionType] = {name: partial(draw, _TERSE) for name, draw in _TYPES.items()}
