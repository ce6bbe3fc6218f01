"""Questions about a gridworld scene, with exact answers, and how far a guesser who sees no image gets.

Six types, and the caption:

    object    What is at b2?                                        red circle | digit 7
    colour    What colour is the shape at b2?                       red
    count     How many red shapes are there?                        2
    exists    Is there a green triangle?                            yes | no
    relation  Which is further left, the red circle or the digit 7? digit 7
    sum       What is the sum of the digits at a1 and b2?           13
    describe  Describe the image.                                   a1 red circle, b1 digit 7, …

Answers are balanced within a type: `exists` is yes half of the time, of `relation`'s two names the first is
right half of the time, and `count` draws its answer before it draws what to count.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from voco_plugin.evaluation.metrics import is_right
from voco_plugin.gridworld.scenes import COLORS, DIGITS, SHAPES, Scene, Thing

DESCRIBE = "describe"


@dataclass(frozen=True)
class Turn:
    """One question with its exact answer; `type` is a key of its question set or `describe`."""

    type: str
    question: str
    answer: str


QuestionType = Callable[[Scene, np.random.Generator, tuple[str, ...]], "tuple[str, str] | None"]
"""Draws a question about a scene and its answer, given the colours in use; None where there is none."""


def pick(rng: np.random.Generator, options):
    """One of `options`, each as likely."""
    return options[int(rng.integers(len(options)))]


def _object(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    index = int(rng.integers(len(scene.things)))
    return f"What is at {scene.cell_name(index)}?", scene.things[index].name


def _colour(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    index = pick(rng, [i for i, thing in enumerate(scene.things) if not thing.is_digit])
    return f"What colour is the shape at {scene.cell_name(index)}?", str(scene.things[index].color)


def _count(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    subjects = [(f"{color} shapes", sum(t.color == color for t in scene.things)) for color in colors]
    subjects += [(f"{shape}s", sum(t.shape == shape for t in scene.things)) for shape in SHAPES]
    number = pick(rng, sorted({count for _, count in subjects}))
    subject = pick(rng, [name for name, count in subjects if count == number])
    return f"How many {subject} are there?", str(number)


def _exists(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    example = pick(rng, scene.things)
    if rng.random() < 0.5:
        return f"Is there a {example.name}?", "yes"
    absent = absent_of_kind(scene, example, colors)
    return (f"Is there a {pick(rng, absent)}?", "no") if absent else None


def absent_of_kind(scene: Scene, example: Thing, colors: tuple[str, ...]) -> list[str]:
    """Names of the digits, or of the shapes, as `example` is one, that the scene does not hold."""
    if example.is_digit:
        others = [f"digit {d}" for d in DIGITS]
    else:
        others = [f"{color} {shape}" for color in colors for shape in SHAPES]
    return [name for name in others if name not in scene.names]


def _relation(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    unique = [i for i, name in enumerate(scene.names) if scene.names.count(name) == 1]
    word, place = pick(rng, [("further left", scene.column), ("higher", scene.row)])
    pairs = [(i, j) for i in unique for j in unique if place(i) < place(j)]
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    answer = scene.things[first].name
    if rng.random() < 0.5:
        first, second = second, first
    return f"Which is {word}, the {scene.things[first].name} or the {scene.things[second].name}?", answer


def _sum(scene: Scene, rng: np.random.Generator, colors: tuple[str, ...]) -> tuple[str, str] | None:
    digits = [i for i, thing in enumerate(scene.things) if thing.is_digit]
    if len(digits) < 2:
        return None
    i, j = (digits[int(k)] for k in sorted(rng.choice(len(digits), 2, replace=False)))
    total = (scene.things[i].digit or 0) + (scene.things[j].digit or 0)
    return f"What is the sum of the digits at {scene.cell_name(i)} and {scene.cell_name(j)}?", str(total)


QUESTION_TYPES: dict[str, QuestionType] = {
    "object": _object,
    "colour": _colour,
    "count": _count,
    "exists": _exists,
    "relation": _relation,
    "sum": _sum,
}


def describe(scene: Scene) -> Turn:
    """The caption: every cell's name and content, in row-major order."""
    parts = [f"{scene.cell_name(i)} {thing.name}" for i, thing in enumerate(scene.things)]
    return Turn(DESCRIBE, "Describe the image.", ", ".join(parts))


_BOXES = re.compile(r"\[.*?\]")


def ask(
    scene: Scene,
    rng: np.random.Generator,
    num_questions: int,
    num_colors: int,
    types: Mapping[str, QuestionType] = QUESTION_TYPES,
) -> list[Turn]:
    """Draws `num_questions` different questions about one scene, going round the `types` it allows; no box
    comes twice.

    Raises:
        ValueError: the scene does not allow that many different questions.
    """
    colors = tuple(COLORS)[:num_colors]
    turns: list[Turn] = []
    seen: set[str] = set()
    for _ in range(20 * num_questions):
        for kind in rng.permutation(sorted(types)):
            asked = types[str(kind)](scene, rng, colors)
            if asked is None:
                continue
            said = {asked[0], *_BOXES.findall(" ".join(asked))}
            if said & seen:
                continue
            seen |= said
            turns.append(Turn(str(kind), *asked))
            if len(turns) == num_questions:
                return turns
    raise ValueError(
        f"a {scene.grid} x {scene.grid} scene has fewer than {num_questions} different questions: ask fewer"
    )


def blind_accuracy(train: Iterable[Turn], test: Iterable[Turn]) -> dict[str, float]:
    """Accuracy, 0…1, of the best guesser who sees no image: per question text, the training answer that is
    right most often there.

    A question never seen in training gets its type's best answer. Keys: each type in `test`, and `all`.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for turn in train:
        by_text[turn.question][turn.answer] += 1
        by_type[turn.type][turn.answer] += 1
    guesses: dict[tuple[str, str], str] = {}
    hits: dict[str, list[bool]] = defaultdict(list)
    for turn in test:
        key = (turn.type, turn.question if turn.question in by_text else "")
        if key not in guesses:
            guesses[key] = _best_guess(turn.type, by_text.get(turn.question) or by_type[turn.type])
        right = is_right(turn.type, guesses[key], turn.answer)
        hits[turn.type].append(right)
        hits["all"].append(right)
    return {kind: float(np.mean(values)) for kind, values in sorted(hits.items())}


def _best_guess(kind: str, counts: Counter[str]) -> str:
    """The answer that is right for most of `counts`; ties go to the alphabetically first, whatever the order
    of the data. Where near answers count too, the `_MAX_GUESSES` commonest are weighed."""
    if not counts:
        return ""
    commonest = sorted(counts, key=lambda answer: (-counts[answer], answer))[:_MAX_GUESSES]
    some = {answer: counts[answer] for answer in commonest}

    def worth(answer: str) -> int:
        return sum(number for truth, number in some.items() if is_right(kind, answer, truth))

    return min(some, key=lambda answer: (-worth(answer), answer))


_MAX_GUESSES = 200
