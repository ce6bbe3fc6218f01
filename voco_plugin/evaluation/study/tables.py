"""A study's tables, as one Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reporting.report import Report
from .definition import Study
from .figures import Figures, Interval, Row, columns_of


def percent(value: float | None, digits: int = 1) -> str:
    """``0.837`` → ``83.7``; a dash for none."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def with_interval(value: float | None, bounds: Interval) -> str:
    """``83.7 [81.2, 85.9]``."""
    if value is None or bounds is None:
        return percent(value)
    return f"{percent(value)} [{percent(bounds[0])}, {percent(bounds[1])}]"


def tokens(row: Row) -> str:
    """K; ``16 → 4`` where a training with 16 was read at 4."""
    if row.num_tokens is None:
        return "–"
    if row.trained_tokens == row.num_tokens or row.bound == "lower":
        return str(row.num_tokens)
    return f"{row.trained_tokens} → {row.num_tokens}"


def size(count: float | None) -> str:
    if count is None:
        return "–"
    return f"{count / 1024:,.1f} KiB" if count >= 1024 else f"{count:,.0f} B"


def _value(value: Any) -> str:
    """Of a key that was searched over, as the YAML has it."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def page(
    name: str,
    study: Study,
    figures: Figures,
    *,
    command: str,
    search: Sequence[Mapping[str, Any]] = (),
    missing: Sequence[str] = (),
    failures: Sequence[Any] = (),
    environments: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[tuple[Path, str]] = (),
) -> Report:
    """Everything a study found, as a :class:`~voco_plugin.evaluation.reporting.report.Report` to be
    written.
    """
    report = Report(name).code(command)
    report.text(_machines(environments))
    for failure in failures:
        report.text(f"**Failed: {', '.join(failure.runs)}.** `{failure.command}`: status {failure.status}.")
    if missing:
        report.text(f"**Not finished: {', '.join(missing)}.** The tables hold what is.")
    if not figures.rows:
        return report.text("No run is finished.")
    report.heading("Methods")
    _main(report, study, figures)
    report.text(_caption(study, figures))
    _by_column(report, figures)
    _by_turn(report, figures)
    _differences(report, figures)
    _curves(report, study, figures)
    _search(report, search)
    if pictures:
        report.heading("Pictures")
        for path, alt in pictures:
            report.picture(path, alt)
    return report


def _machines(environments: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for one in environments:
        versions = ", ".join(f"{package} {version}" for package, version in one["versions"].items())
        lines.append(
            f"{one['device_name']} ({one['device']}), {one['threads']} thread(s) a run of {one['cores']} "
            f"cores; Python {one['python']}, {versions}."
        )
    return "\n\n".join(lines) or "No machine is recorded."


def _main(report: Report, study: Study, figures: Figures) -> None:
    searched = list(study.search.over) if study.search else []
    header = [
        "method", "K", "per seed %", "accuracy % [95 %]", "raw ratio % [95 %]", "retention % [95 %]",
        "an image", "weights trained", "training s", *searched,
    ]  # fmt: skip
    rows = []
    for row in figures.rows:
        seconds = "–" if row.train_seconds is None else f"{row.train_seconds:,.0f}{'*' if row.scaled else ''}"
        rows.append(
            [
                row.label, tokens(row), ", ".join(percent(value) for value in row.per_seed),
                with_interval(row.accuracy, row.accuracy_interval), with_interval(row.raw, row.raw_interval),
                with_interval(row.retention, row.retention_interval), size(row.cache_bytes),
                "–" if row.trained_parameters is None else f"{row.trained_parameters:,}", seconds,
                *(_value(row.tried.get(key)) for key in searched),
            ]
        )  # fmt: skip
    report.table(header, rows)


def _caption(study: Study, figures: Figures) -> str:
    count = sum(len(figures.questions[name]["rows"]) for name in figures.sets)
    what = "whole images, with all their questions," if study.resample == "images" else "questions"
    text = (
        f"{count:,} questions, {_asked(study, figures)}, exact match. "
        "raw ratio = x / upper; retention = (x − lower) / (upper − lower) (paper, Sec. 4.2); the bounds are "
        "those of the same K where the study has them, "
        f"else of their smallest. Intervals: 2.5 and 97.5 percentiles of a bootstrap over {what} (the same "
        "draw for every method) and over the seeds of each method; a ratio is taken within each draw. With "
        "three seeds they are somewhat narrow for what seeds add; one seed says nothing of others."
    )
    if len(figures.sets) > 1:
        text += " Over several sets: the mean of the sets' accuracies, and of their ratios."
    if any(row.scaled for row in figures.rows):
        text += " *: a training was killed and went on; its seconds are scaled up by its steps."
    if any(row.cache_bytes is not None and row.bound in ("upper", "base") for row in figures.rows):
        text += " The upper bound's bytes are those of the keys and values of its vision tokens."
    return text


def _asked(study: Study, figures: Figures) -> str:
    """How the sets' questions were put."""
    sets = {name: study.eval_data[name] for name in figures.sets}
    turns = [name for name, one in sets.items() if one.turns]
    text = "each asked alone"
    if turns:
        where = "" if len(turns) == len(sets) else f" (those of {', '.join(turns)})"
        text = (
            f"each asked{' alone or' if where else ''} after the turns of its conversation before it{where}"
        )
    front = [name for name, one in sets.items() if one.text_before is not None]
    if front:
        where = "" if len(front) == len(sets) else f" in {', '.join(front)}"
        text += f", with a text before the image{where}"
    return text


def _by_turn(report: Report, figures: Figures) -> None:
    for name, rows in figures.by_turn().items():
        turns = list(rows[0][1]) if rows else []
        report.heading("By turn" if len(figures.sets) == 1 else f"By turn: {name}")
        report.text("Accuracy %, by which question of its conversation it was; mean over seeds.")
        report.table(
            ["method", "K", *map(str, turns)],
            [[row.label, tokens(row), *(percent(found[turn]) for turn in turns)] for row, found in rows],
        )


def _by_column(report: Report, figures: Figures) -> None:
    columns = columns_of(figures.rows)
    if len(columns) < 2:
        return
    what = "set" if len(figures.sets) > 1 else "question type"
    report.heading(f"By {what}")
    rows = [
        [row.label, tokens(row), *(percent(row.columns.get(name), 0) for name in columns)]
        for row in figures.rows
    ]
    report.text("Accuracy %.").table(["method", "K", *columns], rows)
    rows = [
        [
            row.label, tokens(row),
            *(
                f"{percent(row.column_raw.get(name), 0)} / {percent(row.column_retention.get(name), 0)}"
                for name in columns
            ),
        ]
        for row in figures.rows
        if row.raw is not None
    ]  # fmt: skip
    if rows:
        report.text(
            "Raw ratio % / retention %. Where the bounds are close, retention swings widely; a dash where "
            "the upper bound is not above the lower."
        )
        report.table(["method", "K", *columns], rows)


def _differences(report: Report, figures: Figures) -> None:
    if not figures.differences:
        return
    shown = {row.method: row.label for row in figures.rows}
    reference = figures.differences[0].reference
    report.heading(f"Against {shown[reference]}")
    rows = [
        [
            shown[one.method], one.num_tokens,
            f"{100 * one.difference:+.1f} [{100 * one.interval[0]:+.1f}, {100 * one.interval[1]:+.1f}]",
            ("better" if one.difference > 0 else "worse") if one.clear else "not told apart",
        ]
        for one in figures.differences
    ]  # fmt: skip
    report.table(["method", "K", "difference in accuracy, points [95 %]", ""], rows)
    report.text(
        "Paired over questions. Each interval stands alone: of twenty comparisons between equals, one is "
        "expected to leave 0 out."
    )


def _curves(report: Report, study: Study, figures: Figures) -> None:
    if not figures.curves:
        return
    steps = sorted({step for by_step in figures.curves.values() for step in by_step})
    shown = {row.method: row.label for row in figures.rows}
    rows = []
    for (method, k), by_step in figures.curves.items():
        cells = []
        for step in steps:
            values = by_step.get(step)
            cells.append("–" if not values else f"{100 * sum(values) / len(values):.1f}")
        rows.append([shown.get(method, method), k, *cells])
    report.heading("Accuracy % against training steps")
    report.table(["method", "K", *map(str, steps)], rows)
    some = f" of the first {study.curve_images} test images" if study.curve_images else ""
    report.text(
        f"Checkpoints of the same trainings (one learning-rate cycle to the end){some}; mean over seeds."
    )


def _search(report: Report, search: Sequence[Mapping[str, Any]]) -> None:
    if not search:
        return
    report.heading("Search")
    keys = list(search[0]["tried"])
    rows = [
        [
            one["method"], one["num_tokens"], one["seed"], *(_value(one["tried"][key]) for key in keys),
            percent(one["accuracy"]), "chosen" if one["chosen"] else "",
        ]
        for one in search
    ]  # fmt: skip
    report.table(["method", "K", "seed", *keys, "validation accuracy %", ""], rows)
    report.text("The same values for every method, chosen on validation data, then used for all seeds and K.")
