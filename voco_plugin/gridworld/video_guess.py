"""The score of a guesser who sees every picture perfectly, but one frame only, or all of them out of order.

`blind_accuracy` says what the questions alone give away; these two figures say what a single frame gives
away, and what an unordered pile of frames does. The guesser knows the world: it was told the answers of the
training split. It cannot tell more than the **role** that an answer has in what it sees (the digit in sight,
the cell in which the mover is for the second longest time, …), so for each question it takes the role that
was right most often in training, and draws among the answers that have it.

    single     the middle frame
    shuffled   how long each thing is seen, and where; of single times nothing
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable

import numpy as np

from voco_plugin.gridworld.scenes import DIGITS
from voco_plugin.gridworld.video_questions import ORDER_TYPES, SUBJECTS, VideoTurn
from voco_plugin.gridworld.video_scenes import CELL_NAMES, Video

Cue = tuple[Hashable, dict[str, Hashable]]
"""What of a question and its video bears on the answer: a key, and the role of each possible answer."""

_DIGITS = tuple(str(digit) for digit in DIGITS)
_COUNTS = tuple(str(number) for number in range(9))


def guess_accuracy(
    train: Iterable[tuple[Video, VideoTurn]], test: Iterable[tuple[Video, VideoTurn]], view: str
) -> dict[str, float]:
    """Expected accuracy, 0…1, of the best such guesser on `test`, per type and over `all`.

    Args:
        view: `single` or `shuffled`.
    """
    cue = CUES[view]
    hits: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for video, turn in train:
        key, roles = cue(video, turn)
        if turn.answer in roles:
            hits[turn.type, key][roles[turn.answer]] += 1
    found: dict[str, list[float]] = defaultdict(list)
    for video, turn in test:
        key, roles = cue(video, turn)
        sizes = Counter(roles.values())
        seen = hits[turn.type, key]
        best = max(sorted(sizes, key=repr), key=lambda role: seen[role] / sizes[role])
        right = 1 / sizes[best] if roles.get(turn.answer) == best else 0.0
        found[turn.type].append(right)
        found["all"].append(right)
    return {kind: float(np.mean(values)) for kind, values in sorted(found.items())}


def _candidates(turn: VideoTurn) -> tuple[str, ...]:
    """The answers that the question leaves open."""
    if turn.type == "first":
        return turn.names
    if turn.type in ("next", "needle") or turn.word == "digit":
        return tuple(digit for digit in _DIGITS if digit not in turn.names)
    if turn.type in ("where", "needle_cell") or turn.word == "cell":
        return CELL_NAMES
    return _COUNTS if turn.type == "count" else ("yes", "no")


def _single(video: Video, turn: VideoTurn) -> Cue:
    scene = video.scene(video.middle)
    digits = {str(thing.digit) for thing in scene.things if thing.is_digit}
    seen = digits | set(scene.names)
    named = tuple(name in seen for name in turn.names)
    open_ones = _candidates(turn)
    if turn.type == "count":
        fits = SUBJECTS[turn.word]
        return (turn.word, sum(map(fits, scene.things))), {c: c for c in open_ones}
    if open_ones == ("yes", "no"):
        return named, {c: c for c in open_ones}
    if open_ones == CELL_NAMES:
        cells = {CELL_NAMES[i] for i, name in enumerate(scene.names) if name in turn.names}
        return turn.word, {c: c in cells for c in open_ones}
    return (turn.word, any(named)), {c: c in seen for c in open_ones}


def _shuffled(video: Video, turn: VideoTurn) -> Cue:
    if turn.type not in ORDER_TYPES:
        return "", {turn.answer: "counted"}  # the order says nothing: every frame is there to be read
    if turn.type == "needle_half":
        return "", {"yes": "yes", "no": "no"}
    frames: Counter[str] = Counter()
    for frame in range(len(video.frames)):
        scene = video.scene(frame)
        for index, thing in enumerate(scene.things):
            frames[str(thing.digit) if thing.is_digit else thing.name] += 1
            if turn.names == (thing.name,):
                frames[CELL_NAMES[index]] += 1
    if turn.type == "before":
        first, second = (frames[name] for name in turn.names)
        return (first > second) - (first < second), {"yes": "yes", "no": "no"}
    open_ones = _candidates(turn)
    ranks = sorted({frames[c] for c in open_ones}, reverse=True)
    return (turn.word, len(ranks)), {c: (ranks.index(frames[c]), frames[c] > 0) for c in open_ones}


CUES: dict[str, Callable[[Video, VideoTurn], Cue]] = {"single": _single, "shuffled": _shuffled}
