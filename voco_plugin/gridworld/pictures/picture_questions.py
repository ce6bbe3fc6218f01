"""Questions about a scene of named pictures, in plain English with short exact answers.

    place     What is at the top left?             a dog
    where     Where is the dog?                    at the top left
    exists    Is there a dog?                      yes | no
    kind      Is there an animal?                  yes | no
    count     How many animals are there?          2
    number    How many things are there?           5
    which     Which animal is there?               a dog
    category  What kind of thing is at the top left?  an animal
    next      What is directly left of the dog?    an apple
    relation  Is the dog above the apple?          yes | no
    list      List all things.                     a dog, an apple
    describe  Describe the picture.                top left a dog, middle an apple

A thing is named with its article, since a tokenizer has one token for a word after a space where it has
several for the same word at an answer's start (SmolLM2: 242 of 409 names are one token there, 70 here), and
an LLM that reads a vision token as " dog" can say " dog".
Answers are balanced within a type: `exists`, `kind` and `relation` are yes half of the time (a name that is
not there is half of the time of a kind that is), and `count` draws its answer before it draws what to count.
`next` means the neighbouring cell. A thing that the scene shows twice is asked about by neither `where`,
`next` nor `relation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from voco_plugin.gridworld.pictures.picture_scenes import (
    PictureScene,
    Shown,
    kind_weights,
)
from voco_plugin.gridworld.pictures.vocabulary import Name, article, plural, verb
from voco_plugin.gridworld.questions import DESCRIBE, Turn, blind_accuracy, pick

MAX_LISTED = 4
"""`list` is asked of so many pictures at most."""
# one count in so many is zero
_ZERO_OF = 6


@dataclass(frozen=True)
class World:
    """What may be asked about: the names that scenes of a split show, and their kinds with weights."""

    names: tuple[Name, ...]

    @property
    def by_kind(self) -> dict[str, list[Name]]:
        found: dict[str, list[Name]] = {}
        for name in self.names:
            found.setdefault(name.kind, []).append(name)
        return found


Asked = tuple[str, str]
QuestionType = Callable[[PictureScene, np.random.Generator, World], "Asked | None"]
"""Draws a question about a scene and its answer; None where there is none."""


def at(place: str) -> str:
    """`in the middle`, `at the top left`."""
    return "in the middle" if place == "middle" else f"at the {place}"


def _place(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    thing = pick(rng, scene.shown)
    return f"What is {at(thing.place)}?", article(thing.name)


def _where(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    once = scene.once()
    if not once:
        return None
    thing = pick(rng, once)
    return f"Where {verb(thing.name)} the {thing.name}?", at(thing.place)


def _exists(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    if int(rng.integers(2)):
        return _there(pick(rng, scene.shown).name), "yes"
    kinds = {thing.kind for thing in scene.shown}
    absent = [name for name in world.names if name.text not in scene.names]
    near = [name for name in absent if name.kind in kinds]
    if near and int(rng.integers(2)):
        absent = near
    return (_there(pick(rng, absent).text), "no") if absent else None


def _there(text: str) -> str:
    """`Is there a dog?`, `Are there grapes?`"""
    return f"{verb(text).capitalize()} there {article(text)}?"


def _kind(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    """A kind is asked about as often with yes as with no: common ones less often among those present."""
    weights = kind_weights(world.by_kind)
    there = {thing.kind for thing in scene.shown}
    if int(rng.integers(2)):
        present = [kind for kind in weights if kind in there]
        kind = _rarely(rng, {kind: weights[kind] for kind in present})
        return f"Is there {article(kind)}?", "yes"
    absent = [kind for kind in weights if kind not in there]
    return (f"Is there {article(pick(rng, absent))}?", "no") if absent else None


def _rarely(rng: np.random.Generator, weights: Mapping[str, int]) -> str:
    """One of the keys, the likelier the smaller its weight; whole numbers only."""
    shares = {key: 10**9 // weight for key, weight in weights.items()}
    aim = int(rng.integers(sum(shares.values())))
    for key, share in shares.items():
        aim -= share
        if aim < 0:
            return key
    raise AssertionError("shares do not add up")


def _count(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    counts = {kind: sum(thing.kind == kind for thing in scene.shown) for kind in world.by_kind}
    some = sorted(set(counts.values()) - {0})
    number = 0 if int(rng.integers(_ZERO_OF)) == 0 and 0 in counts.values() else pick(rng, some)
    kind = pick(rng, [kind for kind, count in counts.items() if count == number])
    return f"How many {plural(kind)} are there?", str(number)


def _number(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    return "How many things are there?", str(len(scene.shown))


def _which(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    kinds = [thing.kind for thing in scene.shown]
    alone = [thing for thing in scene.shown if kinds.count(thing.kind) == 1]
    if not alone:
        return None
    thing = pick(rng, alone)
    return f"Which {thing.kind} is there?", article(thing.name)


def _category(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    thing = pick(rng, scene.shown)
    return f"What kind of thing is {at(thing.place)}?", article(thing.kind)


_BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def _next(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    by_cell = {(thing.row, thing.column): thing for thing in scene.shown}
    found: list[tuple[str, Shown, Shown]] = []
    for thing in scene.once():
        for word, (down, right) in _BESIDE.items():
            other = by_cell.get((thing.row + down, thing.column + right))
            if other is not None:
                found.append((word, thing, other))
    if not found:
        return None
    word, thing, other = pick(rng, found)
    return f"What is directly {word} the {thing.name}?", article(other.name)


def _relation(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    once = scene.once()
    word = pick(rng, ("left of", "right of", "above", "below"))
    down, right = _BESIDE[word]

    def along(thing: Shown) -> int:
        return down * thing.row + right * thing.column

    pairs = [(a, b) for a in once for b in once if along(a) > along(b)]
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    answer = "yes"
    if int(rng.integers(2)):
        first, second, answer = second, first, "no"
    return f"{verb(first.name).capitalize()} the {first.name} {word} the {second.name}?", answer


def _list(scene: PictureScene, rng: np.random.Generator, world: World) -> Asked | None:
    if len(scene.shown) > MAX_LISTED:
        return None
    return "List all things.", ", ".join(article(name) for name in scene.names)


PICTURE_TYPES: dict[str, QuestionType] = {
    "place": _place,
    "where": _where,
    "exists": _exists,
    "kind": _kind,
    "count": _count,
    "number": _number,
    "which": _which,
    "category": _category,
    "next": _next,
    "relation": _relation,
    "list": _list,
}
NAMELESS = ("kind", "count", "number", "category")
"""What can be asked about things whose names training never said."""


def describe(scene: PictureScene) -> Turn:
    """The caption: every place that holds something, in reading order."""
    said = ", ".join(f"{thing.place} {article(thing.name)}" for thing in scene.shown)
    return Turn(DESCRIBE, "Describe the picture.", said)


def ask(
    scene: PictureScene,
    rng: np.random.Generator,
    num_questions: int,
    world: World,
    types: Sequence[str] = tuple(PICTURE_TYPES),
) -> list[Turn]:
    """Draws `num_questions` different questions about one scene, going round the `types` that it allows.

    Raises:
        ValueError: the scene does not allow that many different questions.
    """
    turns: list[Turn] = []
    seen: set[str] = set()
    for _ in range(20 * num_questions):
        for kind in rng.permutation(sorted(types)):
            asked = PICTURE_TYPES[str(kind)](scene, rng, world)
            if asked is None or asked[0] in seen:
                continue
            seen.add(asked[0])
            turns.append(Turn(str(kind), *asked))
            if len(turns) == num_questions:
                return turns
    raise ValueError(f"num_questions={num_questions}: a scene has fewer different questions; ask fewer")


def guesser(train: Sequence[Turn], test: Sequence[Turn]) -> dict[str, float]:
    """Accuracy, 0…1, of the best guesser who sees no picture, per type and over `all` of `test`.

    Of each type it knows whether to look at the question's text (the training answer that is right most often
    there) or at the type alone, whichever does better on `test`: a figure that no blind model exceeds by
    more than luck.
    """
    by_text = blind_accuracy(train, test)
    plain = blind_accuracy([Turn(t.type, t.type, t.answer) for t in train],
                           [Turn(t.type, t.type, t.answer) for t in test])  # fmt: skip
    best = {kind: max(by_text[kind], plain[kind]) for kind in by_text if kind != "all"}
    counts = {kind: sum(turn.type == kind for turn in test) for kind in best}
    total = sum(counts.values())
    best["all"] = sum(best[kind] * counts[kind] for kind in counts) / total if total else 0.0
    return best
