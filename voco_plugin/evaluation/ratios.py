"""The two ratios by which a compression is judged, and their means; :mod:`.metrics` says when to use each."""

from __future__ import annotations

from collections.abc import Sequence


def raw_ratio(score: float, upper: float) -> float:
    """``score / upper``.

    Raises:
        ValueError: ``upper`` is not positive.
    """
    if upper <= 0:
        raise ValueError(f"raw ratio needs a positive upper bound, not {upper}.")
    return score / upper


def retention(score: float, lower: float, upper: float) -> float:
    """``(score - lower) / (upper - lower)`` (paper, Table 1); below 0 or above 1 where the score lies
    outside.

    Raises:
        ValueError: ``upper`` is not above ``lower``: the bounds leave nothing to retain.
    """
    if upper <= lower:
        raise ValueError(f"retention needs upper > lower, not upper={upper}, lower={lower}.")
    return (score - lower) / (upper - lower)


def average_raw_ratio(scores: Sequence[float], uppers: Sequence[float]) -> float:
    """The mean of :func:`raw_ratio` over benchmarks, given in the same order.

    Raises:
        ValueError: as :func:`raw_ratio`, or the numbers of benchmarks differ.
    """
    _check_columns(scores, uppers)
    return sum(map(raw_ratio, scores, uppers)) / len(scores)


def average_retention(scores: Sequence[float], lowers: Sequence[float], uppers: Sequence[float]) -> float:
    """The mean of :func:`retention` over benchmarks, given in the same order (the paper's Avg.).

    Raises:
        ValueError: as :func:`retention`, or the numbers of benchmarks differ.
    """
    _check_columns(scores, lowers, uppers)
    return sum(map(retention, scores, lowers, uppers)) / len(scores)


def _check_columns(*columns: Sequence[float]) -> None:
    if len({len(column) for column in columns}) != 1 or not columns[0]:
        raise ValueError(
            f"{', '.join(str(len(c)) for c in columns)} scores: give one for each benchmark, at least one."
        )
