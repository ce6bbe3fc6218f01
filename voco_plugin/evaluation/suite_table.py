"""The table of a suite: scores, raw ratio and retention with their intervals, beside published rows.

Intervals are the bootstrap's of :mod:`.intervals`: images are drawn again (questions about one image are not
independent), the same for all rows, so that ratios are paired; benchmarks are drawn independently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .intervals import RESAMPLES, Resampler, interval
from .published import ROWS, Published
from .suites import Benchmark, columns, combine

Pair = tuple[float, float] | None


@dataclass
class Cell:
    """One row's figure of one benchmark.

    Attributes:
        score: in the benchmark's scale; with its ``interval``.
        harness: the harness's own figure in the same scale; ``None`` where it has none.
        ratio, retention: per cent of the upper bound; ``None`` without bounds.
    """

    score: float
    interval: Pair
    questions: int
    images: int
    harness: float | None = None
    ratio: float | None = None
    ratio_interval: Pair = None
    retention: float | None = None
    retention_interval: Pair = None
    judge: dict[str, Any] | None = None


@dataclass
class Row:
    """One model in one mode.

    Attributes:
        role: ``upper``, ``lower`` or empty.
        average_ratio, average_retention: means over the benchmarks that have them, with their intervals.
    """

    name: str
    role: str = ""
    tokens: int | None = None
    cells: dict[str, Cell] = field(default_factory=dict)
    average_ratio: float | None = None
    average_ratio_interval: Pair = None
    average_retention: float | None = None
    average_retention_interval: Pair = None


Runs = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Row → benchmark → what the harness gave (``samples``, ``score``)."""


def build_rows(
    benchmarks: Sequence[Benchmark],
    runs: Runs,
    roles: Mapping[str, str],
    tokens: Mapping[str, int | None],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """The measured rows, in the order of ``runs``.

    Args:
        roles: row → ``upper`` or ``lower``; the other rows are compared with these.
        tokens: row → VoCo tokens an image.

    Raises:
        ValueError: rows of one benchmark did not answer the same questions.
    """
    rows = {name: Row(name, roles.get(name, ""), tokens.get(name)) for name in runs}
    replicates: dict[str, dict[str, np.ndarray]] = {name: {} for name in runs}
    for number, one in enumerate(benchmarks):
        answered = {name: found[one.name] for name, found in runs.items() if one.name in found}
        if not answered:
            continue
        groups = _images(one, answered)
        draws = Resampler(len(groups), groups=groups, resamples=resamples, seed=seed, stream=number)
        for name, found in answered.items():
            values = columns(one, found["samples"])
            drawn = np.stack([draws.means(values[:, i], "all") for i in range(values.shape[1])], axis=-1)
            replicates[name][one.name] = combine(one, drawn)
            own = found.get("score")
            rows[name].cells[one.name] = Cell(
                score=float(combine(one, values.sum(axis=0))), interval=_pair(replicates[name][one.name]),
                questions=len(values), images=len(set(groups)), judge=found.get("judge"),
                harness=None if own is None else own * _harness_scale(one),
            )  # fmt: skip
    _compare(benchmarks, rows, replicates)
    return list(rows.values())


def _harness_scale(one: Benchmark) -> float:
    """The harness gives MMBench in per cent already."""
    return 1.0 if one.task.startswith("mmbench") else one.scale


def _images(one: Benchmark, answered: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Per question the label of its first image: of a row that saw images, else the question itself."""
    asked = {name: [sample["doc_id"] for sample in found["samples"]] for name, found in answered.items()}
    first, *others = asked
    for other in others:
        if asked[other] != asked[first]:
            raise ValueError(
                f"{one.name}: {first} and {other} did not answer the same questions; run both with the same "
                "--limit and the same data."
            )
    for found in answered.values():
        if any(sample.get("images") for sample in found["samples"]):
            return [
                sample["images"][0] if sample.get("images") else f"question {sample['doc_id']}"
                for sample in found["samples"]
            ]
    return [f"question {number}" for number in asked[first]]


def _pair(replicates: np.ndarray) -> Pair:
    return interval(replicates) if np.isfinite(replicates).all() else None


def _compare(
    benchmarks: Sequence[Benchmark], rows: dict[str, Row], replicates: dict[str, dict[str, np.ndarray]]
) -> None:
    """Ratio and retention of each row where the bounds are there; their means over benchmarks."""
    upper = next((name for name, row in rows.items() if row.role == "upper"), None)
    lower = next((name for name, row in rows.items() if row.role == "lower"), None)
    if upper is None:
        return
    for name, row in rows.items():
        kept: dict[str, list[np.ndarray]] = {"ratio": [], "retention": []}
        for one in benchmarks:
            if one.name not in row.cells or one.name not in rows[upper].cells:
                continue
            cell, most = row.cells[one.name], rows[upper].cells[one.name]
            x, top = replicates[name][one.name], replicates[upper][one.name]
            with np.errstate(invalid="ignore", divide="ignore"):
                if most.score > 0:
                    cell.ratio, found = 100 * cell.score / most.score, 100 * x / top
                    cell.ratio_interval = _pair(found)
                    kept["ratio"].append(found)
                if lower is None or one.name not in rows[lower].cells:
                    continue
                least, bottom = rows[lower].cells[one.name], replicates[lower][one.name]
                if most.score > least.score:
                    cell.retention = 100 * (cell.score - least.score) / (most.score - least.score)
                    # where a replicate's bounds meet or cross, its retention says nothing
                    found = 100 * (x - bottom) / np.where(top > bottom, top - bottom, np.nan)
                    cell.retention_interval = _pair(found)
                    kept["retention"].append(found)
        for what, listed in kept.items():
            scores = [getattr(c, what) for c in row.cells.values() if getattr(c, what) is not None]
            if scores:
                setattr(row, f"average_{what}", float(np.mean(scores)))
                setattr(row, f"average_{what}_interval", _pair(np.mean(listed, axis=0)))


# -- as text

NO_BOUNDS = "no upper bound among the rows: neither raw ratio nor retention (--mode base or --upper MODEL)"
NO_LOWER = "no lower bound among the rows: raw ratio only (--mode lower or --lower MODEL)"


def markdown(suite: str, benchmarks: Sequence[Benchmark], rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The report: a table of scores, one of what is left of them, published rows in both."""
    names = [one.name for one in benchmarks if any(one.name in row.cells for row in rows)]
    printed = [row for row in ROWS[suite] if row.average is not None or set(row.scores) & set(names)]
    head = ["", "tokens", *names]
    lines = [f"# {suite}", "", "## Scores", "", _line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [_cell(row.cells.get(name), "score") for name in names]
        lines.append(_line([row.name, _count(row.tokens), *cells]))
    for other in printed:
        if other.scores:
            shown = [_number(other.scores.get(name)) for name in names]
            lines.append(_line([f"*{other.name}*", str(other.tokens), *shown]))
    lines += ["", "Per cent, MME in points (perception); [95 % interval over images]. In italics: published."]
    for what, words in (
        ("ratio", "raw ratio: score / upper bound, %"),
        ("retention", "retention: (score - lower) / (upper - lower), %"),
    ):
        if not any(getattr(row, f"average_{what}") is not None for row in rows):
            continue
        head = ["", "tokens", *names, "average"]
        lines += ["", f"## {words[0].upper()}{words[1:]}", "", _line(head), _line(["---"] * len(head))]
        for row in rows:
            cells = [_cell(row.cells.get(name), what) for name in names]
            average = getattr(row, f"average_{what}"), getattr(row, f"average_{what}_interval")
            lines.append(_line([row.name, _count(row.tokens), *cells, _with(*average)]))
        for other in printed:
            listed = published_shares(printed, other, what)
            if listed or (what == "retention" and other.average is not None):
                here = [listed[name] for name in names if name in listed]
                mean = float(np.mean(here)) if here else other.average  # over what is measured here
                if not here and other.scores:
                    continue
                shown = [_number(listed.get(name)) for name in names]
                lines.append(_line([f"*{other.name}*", str(other.tokens), *shown, _number(mean)]))
    judged = [(row, name) for row in rows for name in names if row.cells.get(name) and row.cells[name].judge]
    if judged:
        lines += ["", "## Judged answers", "", _line(["", "", "right, %", "score, 0 to 5", "judged"]),
                  _line(["---"] * 5)]  # fmt: skip
        for row, name in judged:
            said = row.cells[name].judge or {}
            lines.append(
                _line([row.name, name, _number(100 * said["accuracy"]), _number(said["score"]),
                       str(said["judged"])])
            )  # fmt: skip
    told = [*notes, *(_told(other) for other in printed if other.note)]
    if not any(row.role == "upper" for row in rows):
        told.append(NO_BOUNDS)
    elif not any(row.role == "lower" for row in rows):
        told.append(NO_LOWER)
    if told:
        lines += ["", *(f"- {note}." for note in dict.fromkeys(told))]
    return "\n".join([*lines, ""])


def published_shares(rows: Sequence[Published], row: Published, what: str) -> dict[str, float]:
    """By benchmark the ratio or retention that follows from printed scores and their printed bounds."""
    upper = next((one.scores for one in rows if one.bound == "upper"), {})
    lower = next((one.scores for one in rows if one.bound == "lower"), {})
    if not upper or (what == "retention" and not lower):
        return {}
    return {
        name: 100 * score / upper[name] if what == "ratio"
        else 100 * (score - lower[name]) / (upper[name] - lower[name])
        for name, score in row.scores.items()
    }  # fmt: skip


def _told(row: Published) -> str:
    alone = (
        f"average retention {row.average} % printed: " if row.average is not None and not row.scores else ""
    )
    return f"{row.name}, {row.tokens} token(s): {alone}{row.note}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _count(value: int | None) -> str:
    return "all" if value is None else str(value)


def _with(value: float | None, within: Pair) -> str:
    return _number(value) if within is None else f"{value:.1f} [{within[0]:.1f}, {within[1]:.1f}]"


def _cell(cell: Cell | None, what: str) -> str:
    if cell is None:
        return "–"
    within = cell.interval if what == "score" else getattr(cell, f"{what}_interval")
    return _with(getattr(cell, what), within)
