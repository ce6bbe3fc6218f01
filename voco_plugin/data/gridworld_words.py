"""Short questions with answers of one word: the question set `words`, for studies.

Eight types, from easy to hard:

    only      Colour of circle             red           there is one circle
    object    Object at b2                 circle | 4
    colour    Colour at b2                 red
    exists    Any red circle               yes | no
    count     Count circles                3
    count_in  Count red in row 2           1
    relation  Is red circle above digit 4  yes | no
    sum       Sum of a1 and b2             6

A question costs about four tokens and its answer one, so that a conversation of twelve asks much of one image
and a training step little of the machine. The word an answer turns on comes last: where a question mark and
`ASSISTANT:` stand between it and the answer, a small LLM first has to learn to carry it there
(docs/decisions.md). Answers are balanced as in `gridworld_questions`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from voco_plugin.data.gridworld_questions import QuestionType, absent_of_kind, pick
from voco_plugin.data.gridworld_scenes import SHAPES, Scene, Thing


def _word(thing: Thing) -> str:
    """A thing's kind in one word: its shape, or the digit's value."""
    return str(thing.digit) if thing.is_digit else str(thing.shape)


def _only(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    shapes = [thing.shape for thing in scene.things]
    single = [thing for thing in scene.things if thing.shape and shapes.count(thing.shape) == 1]
    if not single:
        return None
    thing = pick(rng, single)
    return f"Colour of {thing.shape}", str(thing.color)


def _object(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    index = int(rng.integers(len(scene.things)))
    return f"Object at {scene.cell_name(index)}", _word(scene.things[index])


def _colour(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    index = pick(rng, [i for i, thing in enumerate(scene.things) if not thing.is_digit])
    return f"Colour at {scene.cell_name(index)}", str(scene.things[index].color)


def _exists(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    example = pick(rng, scene.things)
    if rng.random() < 0.5:
        return f"Any {example.name}", "yes"
    absent = absent_of_kind(scene, example, colors)
    return (f"Any {pick(rng, absent)}", "no") if absent else None


def _subjects(things: Iterable[Thing], colors: tuple[str, ...]) -> list[tuple[str, int]]:
    """What can be counted among `things`, with how many there are."""
    things = list(things)
    counts = [(color, sum(t.color == color for t in things)) for color in colors]
    counts += [(f"{shape}s", sum(t.shape == shape for t in things)) for shape in SHAPES]
    return [*counts, ("digits", sum(t.is_digit for t in things))]


def _drawn(rng: np.random.Generator, subjects: list[tuple[str, int]]) -> tuple[str, str]:
    """A subject and its number: the number is drawn first, so that large ones are as likely as small ones."""
    number = pick(rng, sorted({count for _, count in subjects}))
    return pick(rng, [name for name, count in subjects if count == number]), str(number)


def _count(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    subject, number = _drawn(rng, _subjects(scene.things, colors))
    return f"Count {subject}", number


def _count_in(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    line = int(rng.integers(scene.grid))
    place, where = pick(rng, [(scene.row, f"row {line + 1}"), (scene.column, f"column {chr(97 + line)}")])
    inside = [thing for index, thing in enumerate(scene.things) if place(index) == line]
    subject, number = _drawn(rng, _subjects(inside, colors))
    return f"Count {subject} in {where}", number


def _relation(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    unique = [i for i, name in enumerate(scene.names) if scene.names.count(name) == 1]
    word, place = pick(rng, [("left of", scene.column), ("above", scene.row)])
    pairs = [(i, j) for i in unique for j in unique if place(i) < place(j)]
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    answer = "yes"
    if rng.random() < 0.5:
        first, second, answer = second, first, "no"
    return f"Is {scene.names[first]} {word} {scene.names[second]}", answer


def _sum(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    digits = [i for i, thing in enumerate(scene.things) if thing.is_digit]
    if len(digits) < 2:
        return None
    i, j = (digits[int(k)] for k in sorted(rng.choice(len(digits), 2, replace=False)))
    total = (scene.things[i].digit or 0) + (scene.things[j].digit or 0)
    return f"Sum of {scene.cell_name(i)} and {scene.cell_name(j)}", str(total)


WORD_TYPES: dict[str, QuestionType] = {
    "only": _only,
    "object": _object,
    "colour": _colour,
    "exists": _exists,
    "count": _count,
    "count_in": _count_in,
    "relation": _relation,
    "sum": _sum,
}
