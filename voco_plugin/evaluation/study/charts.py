"""Pictures of a study: ratios against K, method against method, accuracy against steps, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reporting.charts import _pyplot, _save


def draw_study(figures: Any, folder: str | Path) -> list[tuple[Path, str]]:
    """Every picture that the figures (:class:`voco_plugin.evaluation.study.figures.Figures`) have data for.

    Returns:
        path and description of each, in ``folder``.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder = Path(folder)
    drawers = (
        (_against_k, "k.png", "raw ratio and retention against K"),
        (_methods, "methods.png", "accuracy of each method, with 95 % intervals"),
        (_steps, "steps.png", "accuracy against training steps"),
        (_costs, "costs.png", "bytes of an image and seconds of training against accuracy"),
    )
    made = []
    plt = _pyplot()
    colours = _colours(figures, plt)
    for draw, name, what in drawers:
        figure = draw(figures, plt, colours)
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # an earlier one would show what is no longer there
        else:
            made.append((_save(figure, folder / name), what))
    return made


def _colours(figures: Any, plt: Any) -> dict[str, Any]:
    """One colour a method, in every picture; bounds are grey."""
    names = list(dict.fromkeys(row.method for row in figures.rows if row.bound is None))
    palette = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    found = {name: palette(number % palette.N) for number, name in enumerate(names)}
    return found | {row.method: "0.45" for row in figures.rows if row.bound is not None}


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25)
    axes.set_axisbelow(True)


def _series(figures: Any) -> dict[tuple[str, str], list[Any]]:
    """(method, legend) → rows over K: of one training read at several K where that is what varies."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in figures.rows:
        if row.bound is not None or row.num_tokens is None:
            continue
        elastic = (
            sum(r.method == row.method and r.trained_tokens == row.trained_tokens for r in figures.rows) > 1
        )
        legend = f"{row.label}, trained at {row.trained_tokens}" if elastic else row.label
        found.setdefault((row.method, legend), []).append(row)
    return {key: sorted(rows, key=lambda r: r.num_tokens) for key, rows in found.items() if len(rows) > 1}


def _errors(values: Sequence[float], intervals: Sequence[Any]) -> Any:
    """``yerr`` of points, in percent; none where an interval is missing."""
    if any(one is None for one in intervals):
        return None
    low = [max(0.0, 100 * (v - i[0])) for v, i in zip(values, intervals, strict=True)]
    high = [max(0.0, 100 * (i[1] - v)) for v, i in zip(values, intervals, strict=True)]
    return [low, high]


def _against_k(figures: Any, plt: Any, colours: dict[str, Any]) -> Any:
    series = {key: [r for r in rows if r.raw is not None] for key, rows in _series(figures).items()}
    series = {key: rows for key, rows in series.items() if rows}
    if not series:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
    for axes, name, title in (
        (panels[0], "raw", "raw ratio, x / upper"),
        (panels[1], "retention", "retention, (x − lower) / (upper − lower)"),
    ):
        for (method, legend), rows in series.items():
            rows = [r for r in rows if getattr(r, name) is not None]
            values = [getattr(r, name) for r in rows]
            axes.errorbar(
                [r.num_tokens for r in rows], [100 * v for v in values],
                yerr=_errors(values, [getattr(r, f"{name}_interval") for r in rows]) if rows else None,
                marker="o", markersize=4, capsize=3, linewidth=1.4, label=legend, color=colours[method],
            )  # fmt: skip
        axes.axhline(100, color="0.45", linewidth=0.8)
        ticks = sorted({r.num_tokens for rows in series.values() for r in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.set_xlabel("K, VoCo tokens an image")
        axes.set_ylabel("%")
        axes.set_title(title)
        _bare(axes)
    panels[1].legend(frameon=False, fontsize=8)
    return figure


def _methods(figures: Any, plt: Any, colours: dict[str, Any]) -> Any:
    rows = figures.rows
    if len(rows) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(rows) + 1.2), layout="constrained")
    at = range(len(rows))
    values = [row.accuracy for row in rows]
    axes.barh(
        at, [100 * v for v in values], 0.7, color=[colours[row.method] for row in rows],
        xerr=_errors(values, [row.accuracy_interval for row in rows]), ecolor="0.15", capsize=3, alpha=0.85,
    )  # fmt: skip
    for place, row in zip(at, rows, strict=True):
        axes.plot([100 * v for v in row.per_seed], [place] * len(row.per_seed), "k.", markersize=4)
    names = [row.label if row.num_tokens is None else f"{row.label}, K = {_tokens(row)}" for row in rows]
    axes.set_yticks(list(at), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy % (bar: mean over seeds, 95 % interval; dots: seeds)")
    _bare(axes)
    return figure


def _tokens(row: Any) -> str:
    changed = row.bound is None and row.trained_tokens != row.num_tokens
    return f"{row.trained_tokens} → {row.num_tokens}" if changed else str(row.num_tokens)


def _steps(figures: Any, plt: Any, colours: dict[str, Any]) -> Any:
    if not figures.curves:
        return None
    shown = {row.method: row.label for row in figures.rows}
    several = {m for m, _ in figures.curves if sum(other == m for other, _ in figures.curves) > 1}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    styles = ("-", "--", ":", "-.")
    for (method, k), by_step in figures.curves.items():
        steps = list(by_step)
        means = [100 * sum(v) / len(v) for v in by_step.values()]
        mine = [other for name, other in figures.curves if name == method]
        label = f"{shown.get(method, method)}, K = {k}" if method in several else shown.get(method, method)
        colour = colours.get(method, "0.45")
        style = styles[mine.index(k) % len(styles)]
        axes.plot(steps, means, style, marker="o", markersize=3, label=label, color=colour)
        low = [100 * min(v) for v in by_step.values()]
        high = [100 * max(v) for v in by_step.values()]
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("accuracy % (mean; band: lowest and highest seed)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _bare(axes)
    return figure


def _costs(figures: Any, plt: Any, colours: dict[str, Any]) -> Any:
    from matplotlib.transforms import ScaledTranslation

    panels: tuple[tuple[str, str, list[Any]], ...] = (
        ("cache_bytes", "bytes an image", [r for r in figures.rows if r.cache_bytes and r.bound != "lower"]),
        ("train_seconds", "seconds of training", [r for r in figures.rows if r.train_seconds]),
    )
    panels = tuple(panel for panel in panels if len(panel[2]) > 1)
    if not panels:
        return None
    figure, grid = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axes, (name, label, rows) in zip(grid[0], panels, strict=True):
        for row, aside in zip(rows, _aside([getattr(row, name) for row in rows]), strict=True):
            cost, values = getattr(row, name), [100 * row.accuracy]
            errors = _errors([row.accuracy], [row.accuracy_interval])
            shifted = axes.transData + ScaledTranslation(aside / 72, 0, figure.dpi_scale_trans)
            axes.errorbar(
                [cost], values, yerr=errors, fmt="o", markersize=4.5, color=colours[row.method], capsize=2,
                transform=shifted, label=row.label,
            )  # fmt: skip
            # shifted points do not widen the axes by themselves
            low, high = (0.0, 0.0) if errors is None else (errors[0][0], errors[1][0])
            axes.update_datalim([(cost, values[0] - low), (cost, values[0] + high)])
            if sum(other.method == row.method for other in rows) > 1 and row.num_tokens is not None:
                axes.annotate(
                    _tokens(row), (cost, values[0]), xytext=(aside + 4, 3), textcoords="offset points",
                    fontsize=7,
                )  # fmt: skip
        front = _front([(getattr(row, name), row.accuracy) for row in rows])
        axes.plot([c for c, _ in front], [100 * a for _, a in front], ":", color="0.5", zorder=0)
        _cost_axis(axes, sorted({getattr(row, name) for row in rows}), label)
        axes.set_ylabel("accuracy %")
        axes.margins(x=0.22)
        _bare(axes)
    named: dict[str, Any] = {}
    for axes in grid[0]:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(text, handle)
    figure.legend(named.values(), named, frameon=False, fontsize=8, loc="outside right center")
    return figure


def _aside(costs: Sequence[float], step: float = 6.0) -> list[float]:
    """Per point how far right it is drawn, in points of 1/72 inch: those of one cost stand side by side."""
    places: list[float] = []
    for number, cost in enumerate(costs):
        same = [other for other, c in enumerate(costs) if c == cost]
        places.append(step * (same.index(number) - (len(same) - 1) / 2))
    return places


def _cost_axis(axes: Any, costs: Sequence[float], label: str) -> None:
    """Logarithmic where costs differ by much; of few different ones each has its number."""
    if costs[-1] > 8 * costs[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
        if len(costs) <= 8:
            axes.set_xticks(costs)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(label)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that none beats in accuracy at no more cost, by rising cost."""
    found: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or accuracy > found[-1][1]:
            found.append((cost, accuracy))
    return found
