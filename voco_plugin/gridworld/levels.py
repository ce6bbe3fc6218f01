"""How hard a gridworld is: named levels, and the question sets they ask from.

quickstart  2 x 2 cells, 4 colours, answers in phrases: small enough to train in minutes
study       2 x 2 cells, 6 colours, answers of one word, few tokens a question: minutes on one core
large       3 x 3 cells, 6 colours, answers of one word
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from voco_plugin.gridworld.box_questions import BOX_TYPES, TERSE_BOX_TYPES
from voco_plugin.gridworld.questions import QUESTION_TYPES, QuestionType
from voco_plugin.gridworld.words import TERSE_TYPES, WORD_TYPES

QUESTION_SETS: dict[str, dict[str, QuestionType]] = {
    "phrases": QUESTION_TYPES,
    "words": WORD_TYPES,
    "terse": TERSE_TYPES,
}


@dataclass(frozen=True)
class Level:
    """The settings of a level; each can be overridden where the level is named.

    Attributes:
        grid: cells per side.
        num_colors: colours in use.
        cell_pixels: pixels per cell side.
        num_questions: questions per image.
        question_set: a key of `QUESTION_SETS`.
        caption: whether a training conversation ends with "Describe the image."
        patch_size: pixels per patch side of the tiny VLM that is made for it; `(grid * cell_pixels /
            patch_size)²` vision tokens an image.
    """

    grid: int
    num_colors: int
    cell_pixels: int
    num_questions: int
    question_set: str
    caption: bool
    patch_size: int


LEVELS: dict[str, Level] = {
    "quickstart": Level(2, 4, 32, 8, "phrases", True, 16),
    "study": Level(2, 6, 16, 6, "terse", True, 8),
    "large": Level(3, 6, 16, 12, "terse", True, 8),
}


def level_of(name: str) -> Level:
    """The level of that name.

    Raises:
        ValueError: there is none.
    """
    return LEVELS[_known("level", name, LEVELS)]


def question_types(name: str, boxes: bool = False) -> dict[str, QuestionType]:
    """The question set of that name: per type, what draws a question; with `boxes`, `rec` and `reg` too.

    Raises:
        ValueError: there is none.
    """
    types = QUESTION_SETS[_known("question_set", name, QUESTION_SETS)]
    if not boxes:
        return types
    return {**types, **(TERSE_BOX_TYPES if name == "terse" else BOX_TYPES)}


def _known(what: str, name: str, names: dict) -> str:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{what}={name!r} is not known{hint}: give one of {', '.join(names)}")
    return name
