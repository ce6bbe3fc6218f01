"""Bootstrap intervals of scores, of their ratios, and of differences between methods that answered the same.

Shapes: ``S`` seeds (trained models), ``Q`` questions, ``R`` replicates.

One replicate draws ``Q`` questions with replacement, **the same for every model and method**, and for each
method ``S`` of its ``S`` seeds with replacement; its value is the mean over both. So an interval speaks of
other questions of the same kind and of other seeds at once, and whatever is computed from several methods (a
difference, a retention) is computed within each replicate, on the same questions: paired. An interval is the
2.5 and 97.5 percentiles of the replicates.

With few seeds it is somewhat too narrow for what seeds add (of three, two thirds of their variance on
average), and with one seed it says nothing of other seeds at all. Questions about one image are not
independent: ``groups`` draws whole images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_KEPT, _AT_A_TIME = 50_000_000, 10_000_000  # numbers held in memory, of 4 bytes each


class Resampler:
    """Draws the replicates of every method that answered the same ``Q`` questions.

    Args:
        num_questions: ``Q``.
        groups: ``(Q,)``: the image (or any other label) of each question; whole groups are then drawn.
        resamples: ``R``.
        seed: of the draws; equal seeds give equal intervals.
        stream: sets of questions that are averaged need one each: their questions are then drawn
            independently, and the seeds of a method are the same in all.

    Raises:
        ValueError: there is no question, or not one group for each.
    """

    def __init__(
        self,
        num_questions: int,
        *,
        groups: Sequence[Any] | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        if num_questions < 1 or resamples < 1:
            raise ValueError(
                f"a bootstrap needs at least one question and one replicate, not {num_questions} and "
                f"{resamples}."
            )
        if groups is not None and len(groups) != num_questions:
            raise ValueError(f"{len(groups)} groups for {num_questions} questions; give one for each.")
        self.num_questions, self.resamples, self.seed, self.stream = num_questions, resamples, seed, stream
        self._labels = None
        if groups is not None:
            self._labels = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
        self._kept = list(self._draw()) if resamples * num_questions <= _KEPT else None

    def _draw(self) -> Iterator[np.ndarray]:
        """How often each replicate has each question, ``(some of R, Q)`` at a time; the same every time."""
        rng = np.random.default_rng([self.seed, 0, self.stream])
        number = self.num_questions if self._labels is None else int(self._labels.max()) + 1
        left = self.resamples
        while left:
            some = min(left, max(1, _AT_A_TIME // self.num_questions))
            counts = rng.multinomial(number, np.full(number, 1 / number), size=some).astype(np.float32)
            yield counts if self._labels is None else counts[:, self._labels]
            left -= some

    def means(self, correct: Any, name: str = "") -> np.ndarray:
        """The mean of each replicate, ``(R,)``.

        Args:
            correct: ``(S, Q)``, or ``(Q,)`` for one model: 1 where the answer is right (any number will do).
            name: of the method: methods of different names draw their seeds independently.

        Raises:
            ValueError: ``correct`` has another number of questions.
        """
        values = np.atleast_2d(np.asarray(correct, dtype=np.float32))
        if values.ndim != 2 or values.shape[1] != self.num_questions or not len(values):
            raise ValueError(
                f"{name or 'correct'} has shape {values.shape}; one row a seed and {self.num_questions} "
                "questions are needed."
            )
        weights = self._draw() if self._kept is None else self._kept
        by_seed = np.concatenate([w @ values.T / w.sum(axis=1)[:, None] for w in weights])  # (R, S)
        word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        rng = np.random.default_rng([self.seed, 1, word])
        drawn = rng.integers(len(values), size=(self.resamples, len(values)))
        return np.take_along_axis(by_seed, drawn, axis=1).mean(axis=1)


def interval(replicates: Any, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of replicates ``(R,)``.

    Raises:
        ValueError: ``level`` is not within 0 … 1, or a replicate is not a number (a ratio to nothing).
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, as in 0.95.")
    values = np.asarray(replicates, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("an interval needs replicates that are all numbers.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(correct: Any, *, level: float = LEVEL, **options: Any) -> tuple[float, float]:
    """The interval of a method's mean score.

    Args:
        correct: ``(S, Q)`` or ``(Q,)``.
        options: of :class:`Resampler`.
    """
    values = np.atleast_2d(np.asarray(correct))
    return interval(Resampler(values.shape[1], **options).means(values), level)


def bootstrap_difference(a: Any, b: Any, *, level: float = LEVEL, **options: Any) -> tuple[float, float]:
    """The interval of ``mean(a) - mean(b)``, paired over questions: where it does not hold 0, one is better.

    Args:
        a, b: ``(S, Q)`` or ``(Q,)``, of the same questions in the same order; ``S`` may differ.
        options: of :class:`Resampler`.

    Raises:
        ValueError: the numbers of questions differ.
    """
    first, second = np.atleast_2d(np.asarray(a)), np.atleast_2d(np.asarray(b))
    draws = Resampler(first.shape[1], **options)
    return interval(draws.means(first, "a") - draws.means(second, "b"), level)
