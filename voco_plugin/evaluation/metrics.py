"""Scores of question answering, and the two ratios by which a compression is judged.

    accuracy   right answers / questions        exact match, :func:`score`
    raw ratio  x / upper                        how much of the score is left
    retention  (x - lower) / (upper - lower)    how much of what vision adds is left (paper, Sec. 4.2)
    average    mean over benchmarks of either   the paper's Avg.: ratios first, then their mean
    interval   2.5 … 97.5 percentiles of means over questions and seeds drawn again (:mod:`.intervals`)

x is the compressed model's score, upper that of the model trained with VoCo tokens under a causal mask, lower
that model's read through the isolation mask. Both ratios, always: where upper and lower are close, retention
says little and swings widely (ScienceQA in the paper's Table 1: 5.8 points between them).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.conversations import is_time_text
from ..data.images import open_image
from . import frame_order
from .agreement import Agreement as Agreement
from .agreement import agreement as agreement
from .boxes import located
from .intervals import Resampler as Resampler
from .intervals import bootstrap as bootstrap
from .intervals import bootstrap_difference as bootstrap_difference
from .intervals import interval as interval
from .ratios import average_raw_ratio as average_raw_ratio
from .ratios import average_retention as average_retention
from .ratios import raw_ratio as raw_ratio
from .ratios import retention as retention


@dataclass(frozen=True)
class Question:
    """One question of a data set: the row it belongs to, its text, the exact answer, and its type (or
    ``all``).

    Attributes:
        before: the questions and reference answers that it is asked after; none where it is asked alone.
    """

    row: int
    text: str
    answer: str
    type: str = "all"
    before: tuple[tuple[str, str], ...] = ()

    @property
    def turn(self) -> int:
        """Which turn of its conversation it is asked as, from 1."""
        return len(self.before) + 1


def questions_of(
    dataset: Iterable[Mapping[str, Any]], skip_types: Iterable[str] = ("describe",), *, turns: bool = False
) -> list[Question]:
    """Each user turn that an assistant turn answers, as a question of its own (see ``gridworld/dataset.py``).
    Time texts of frames and system messages are not part of it.

    Args:
        dataset: rows in TRL's vision format (``messages``; the labels in ``types``, where it has them).
        skip_types: types left out; under ``turns`` they are not asked, and later questions come after them.
        turns: each question comes after the turns before it, with their reference answers.

    Raises:
        ValueError: with ``turns``, a row is no conversation of question and answer in turn, or shows an image
            after its first turn.
    """
    skip = set(skip_types)
    found: list[Question] = []
    for row, sample in enumerate(dataset):
        types = list(sample.get("types") or [])
        asked, number = None, -1
        before: tuple[tuple[str, str], ...] = ()
        for message in sample["messages"]:
            text = _text(message["content"])
            if turns:
                _check_turn(row, message, asked, len(before))
            if message["role"] == "user":
                asked = text
            elif message["role"] == "assistant" and asked is not None:
                number += 1
                kind = types[number] if number < len(types) else "all"
                if kind not in skip:
                    found.append(Question(row, asked, text, kind, before))
                if turns:
                    before = (*before, (asked, text))
                asked = None
    return found


def _check_turn(row: int, message: Mapping[str, Any], asked: str | None, answered: int) -> None:
    """Refuse a message that the turns of a conversation, asked one after the other, have no place for."""
    role, content = message["role"], message["content"]
    if role == ("assistant" if asked is None else "user"):
        raise ValueError(
            f"row {row} has {'an answer without a question' if asked is None else 'two questions in a row'}; "
            "to ask in turns, give conversations of question and answer."
        )
    if answered and not isinstance(content, str) and any(part["type"] == "image" for part in content):
        raise ValueError(
            f"row {row} shows an image in turn {answered + 1}; to ask in turns, all images of a row stand in "
            "its first."
        )


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    said = [
        part.get("text") or ""
        for place, part in enumerate(content)
        if part["type"] == "text" and not is_time_text(content, place)
    ]
    return "".join(said).strip()


def normalise(text: str) -> str:
    """Lower case, outer space and a final full stop gone."""
    return " ".join(text.lower().split()).removesuffix(".")


def exact(given: str, truth: str) -> bool:
    """Whether the answers are the same up to case, outer space and a final full stop."""
    return normalise(given) == normalise(truth)


SCORERS: dict[str, Callable[[str, str], bool]] = {"rec": located}
"""How an answer of a question type is judged, where it is not by exact match."""


def is_right(kind: str, given: str, truth: str) -> bool:
    """Whether ``given`` answers a question of type ``kind`` whose answer is ``truth``."""
    return SCORERS.get(kind, exact)(given, truth)


@dataclass
class Score:
    """Accuracy, 0…1, of a set of answers: exact match, or what :data:`SCORERS` says of a type.

    Attributes:
        accuracy: over all questions.
        by_type: per question type.
        counts: questions per type.
        seconds: what answering took, all in all.
        answers: what was answered, in the questions' order.
        correct: per question whether that is right.
        cache: what an image was kept as (:func:`cache_size`), where it was compressed.
    """

    accuracy: float
    by_type: dict[str, float]
    counts: dict[str, int]
    seconds: float = 0.0
    answers: list[str] = field(default_factory=list, repr=False)
    correct: list[bool] = field(default_factory=list, repr=False)
    cache: dict[str, float] | None = None

    @property
    def num_questions(self) -> int:
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what belongs to single questions."""
        return {
            "accuracy": self.accuracy,
            "by_type": self.by_type,
            "counts": self.counts,
            "seconds": self.seconds,
            "cache": self.cache,
        }


def score(
    questions: Sequence[Question],
    answers: Sequence[str],
    seconds: float = 0.0,
    match: Callable[[str, str], bool] | None = None,
) -> Score:
    """The :class:`Score` of ``answers``, one per question.

    Args:
        match: judges an answer against the truth; ``None``: :func:`is_right`.

    Raises:
        ValueError: there is no question, or not one answer for each; a ``rec`` question has no box for an
            answer.
    """
    if not questions or len(questions) != len(answers):
        raise ValueError(
            f"{len(answers)} answers for {len(questions)} questions; give one per question, and at least one."
        )
    pairs = list(zip(questions, answers, strict=True))
    correct = [is_right(q.type, a, q.answer) if match is None else match(a, q.answer) for q, a in pairs]
    right: dict[str, list[bool]] = defaultdict(list)
    for question, hit in zip(questions, correct, strict=True):
        right[question.type].append(hit)
    by_type = {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}
    counts = {kind: len(hits) for kind, hits in sorted(right.items())}
    return Score(sum(correct) / len(correct), by_type, counts, seconds, list(answers), correct)


def cache_size(caches: Iterable[Any]) -> dict[str, float]:
    """Means over the blocks of ``caches``: ``bytes``, VoCo ``tokens`` and ``vision_tokens`` an image.

    Raises:
        ValueError: there is no block.
    """
    blocks = [block for cache in caches for block in cache]
    if not blocks:
        raise ValueError("no image was compressed, so there is no size to tell.")
    return {
        "bytes": sum(b.nbytes for b in blocks) / len(blocks),
        "tokens": sum(b.num_tokens for b in blocks) / len(blocks),
        "vision_tokens": sum(b.num_vision for b in blocks) / len(blocks),
    }


def evaluate(
    model: Any,
    processor: Any,
    dataset: Any,
    questions: Sequence[Question],
    *,
    mode: str = "images",
    max_new_tokens: int = 16,
    batch_size: int = 32,
    tick: Callable[[int], Any] | None = None,
    caches: Mapping[int, Any] | None = None,
    frames: str = "all",
    seed: int = 0,
    match: Callable[[str, str], bool] | None = None,
    text_before: str | None = None,
) -> Score:
    """Ask ``questions`` about the images of ``dataset``'s rows.

    Args:
        model: attached (it compresses) or plain (it reads every vision token).
        dataset: rows with ``images``, or one ``image``.
        mode: ``images`` puts them into the prompt; ``cache`` compresses each row's images once and asks every
            question from the cache; ``blind`` shows none.
        tick: called with the number of questions just answered.
        caches: for ``cache``: per row the cache of its images, where they are compressed already
            (:func:`compress_rows`).
        frames: which of a row's images are shown, and in which order (:mod:`.frame_order`). Of caches the
            blocks are put in that order: nothing is compressed again.
        seed: of ``shuffled``.
        match: as for :func:`score`.
        text_before: stands before the images of every question.

    Raises:
        ValueError: the mode is unknown, or the model cannot do it.
    """
    from ..inference.answering import answer

    if mode not in ("images", "cache", "blind"):
        raise ValueError(f"mode={mode!r} is not known; use images, cache or blind.")
    frame_order.check_frames(frames)
    start = time.perf_counter()
    size, joined = None, caches
    last: tuple[int, Any, Any] = (-1, [], [])
    if mode == "cache":
        joined = caches or compress_rows(model, processor, dataset, questions, batch_size=batch_size)
        size = cache_size(joined.values())
    answers: list[str] = []
    for begin in range(0, len(questions), batch_size):  # no more rows are open than a batch needs
        asked = questions[begin : begin + batch_size]
        more: dict[str, Any] = {} if mode == "blind" else {"times": []}
        for question in asked if mode != "blind" else ():
            if question.row != last[0]:
                row = dataset[question.row] if mode == "images" else light(dataset, question.row)
                shown: Any = images_of(row) if mode == "images" else (joined or {})[question.row]
                order = frame_order.frame_order(len(shown), frames, seed, question.row)
                times = frame_order.shown_times(frame_order.row_times(row, len(shown)), frames)
                shown = [shown[i] for i in order] if mode == "images" else shown[order]
                last = (question.row, shown, times)
            more.setdefault("images" if mode == "images" else "caches", []).append(last[1])
            more["times"].append(last[2])
        answers += answer(
            model, processor, [q.text for q in asked], max_new_tokens=max_new_tokens, batch_size=batch_size,
            tick=tick, before=[q.before for q in asked], text_before=text_before, **more,
        )  # fmt: skip
    found = score(questions, answers, time.perf_counter() - start, match)
    found.cache = size
    return found


def compress_rows(
    model: Any,
    processor: Any,
    dataset: Any,
    questions: Sequence[Question],
    *,
    num_tokens: int | None = None,
    batch_size: int = 32,
) -> dict[int, Any]:
    """The cache of each row that is asked about: its images, each compressed alone, in order.

    A picture that comes more than once (a frame of several videos) is compressed once.

    Args:
        num_tokens: K; ``None`` takes the model's.
    """
    from ..cache import VoCoCache
    from ..inference.answering import compress_images

    number: dict[str, int] = {}
    keys: dict[int, list[str]] = {}

    def fresh() -> Iterator[Any]:
        for row in sorted({q.row for q in questions}):
            sample = dataset[row]
            keys[row] = []
            for source in _sources(sample):
                key = frame_order.picture_key(source)
                keys[row].append(key)
                if key not in number:
                    number[key] = len(number)
                    yield open_image(source, _name(sample))

    blocks = list(compress_images(model, processor, fresh(), num_tokens=num_tokens, batch_size=batch_size))
    return {row: VoCoCache.cat(blocks[number[key]] for key in found) for row, found in keys.items()}


def light(dataset: Any, row: int) -> Mapping[str, Any]:
    """A row of ``dataset`` without its images, which are not opened (where it can be had without)."""
    column = "images" if "images" in getattr(dataset, "column_names", ()) else None
    return dataset.remove_columns(column)[row] if column else dataset[row]


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of one row, in order, opened.

    Raises:
        BadImageError: one cannot be read; the message names it.
    """
    return [open_image(image, _name(row)) for image in _sources(row)]


def _sources(row: Mapping[str, Any]) -> list[Any]:
    """The images of one row, in order, as they are kept."""
    images = row.get("images", row.get("image"))
    return [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]


def _name(row: Mapping[str, Any]) -> str | None:
    return f"sample {row['id']!r}" if row.get("id") is not None else None
