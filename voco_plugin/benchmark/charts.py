"""Pictures of the benchmarks (``voco bench … --plot``), from their JSON results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.reporting.charts import _pyplot, _save

COLOURS = {
    "dense": "tab:red", "segmented": "tab:green", "plain causal": "tab:gray", "flex": "tab:purple",
    "flash": "tab:blue", "VoCo, dense": "tab:red", "VoCo, segmented": "tab:green", "floor": "tab:gray",
    "VoCo": "tab:green", "full caching": "tab:orange", "no cache": "tab:red",
    "all vision tokens": "tab:gray", "VoCo, sequential": "tab:orange", "VoCo, compact": "tab:green",
}  # fmt: skip
"""One colour a way, in every picture."""


def check_charts() -> None:
    """Raises ``ImportError`` where matplotlib is missing, before minutes are spent."""
    _pyplot()


def draw_benchmark(result: Mapping[str, Any], path: str | Path) -> Path:
    """The picture of a result of ``voco bench``, as PNG.

    Raises:
        ValueError: no benchmark of that name has a picture.
    """
    drawers: dict[str, Callable[[Mapping[str, Any], Any], Any]] = {
        "attention": _attention, "train": _train, "inference": _inference, "context": _context,
    }  # fmt: skip
    name = result["benchmark"]
    if name not in drawers:
        raise ValueError(f"benchmark {name!r} has no picture; use one of {', '.join(drawers)}.")
    plt = _pyplot()
    figure = drawers[name](result, plt)
    figure.text(0.5, -0.02, _footer(result), ha="center", va="top", fontsize=7, color="0.4")
    return _save(figure, path)


def _footer(result: Mapping[str, Any]) -> str:
    if result["benchmark"] == "context":
        return "arithmetic"
    threads = "" if result["device"] != "cpu" else f", {result['threads']} thread(s)"
    return f"{result['device_name']}{threads}, {result['dtype']}, torch {result['versions']['torch']}"


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _attention(result: Mapping[str, Any], plt: Any) -> Any:
    cases = result["cases"]
    frames = [c for c in cases if c["vision_tokens"] == cases[-1]["vision_tokens"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    at = [c["tokens"] for c in frames]
    for name in frames[0]["seconds"]:
        slope = result["slope"].get(name)
        label = name if slope is None else f"{name} (slope {slope:.2f})"
        times = [1000 * c["seconds"][name] for c in frames]
        left.plot(at, times, marker="o", markersize=4, label=label, color=COLOURS.get(name))
    left.plot(at, [1000 * c["floor_seconds"] for c in frames], ":", color="0.5", label="floor: pairs shown")
    for name in frames[0]["mask_bytes"]:
        held = [c["mask_bytes"][name] for c in frames]
        if all(value is not None for value in held):
            sizes = [value / 2**20 for value in held]
            right.plot(at, sizes, marker="o", markersize=4, label=name, color=COLOURS.get(name))
    size = frames[0]["vision_tokens"]
    for axes, label, title in (
        (left, "ms a layer, forward + backward", f"attention over frames of {size} tokens"),
        (right, "MiB", "mask or plan"),
    ):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(at, [f"{n}\n{c['frames']}" for n, c in zip(at, frames, strict=True)])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("tokens of a row, and frames")
        axes.set_ylabel(label)
        axes.set_title(title)
        axes.legend(frameon=False, fontsize=8)
        _bare(axes)
    return figure


def _bars(
    axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], form: str = "%.3g"
) -> None:
    """Grouped bars with their values on top; ``None`` leaves a gap."""
    width = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        kept = [(i - 0.4 + width * (number + 0.5), v) for i, v in enumerate(values) if v is not None]
        if not kept:
            continue
        at, heights = zip(*kept, strict=True)
        bars = axes.bar(at, heights, width * 0.92, label=name, color=COLOURS.get(name))
        axes.bar_label(bars, fmt=form, fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    _bare(axes)


def _train(result: Mapping[str, Any], plt: Any) -> Any:
    cases = result["cases"]
    figure, axes = plt.subplots(figsize=(max(6, 2 * len(cases)), 4), layout="constrained")
    groups = [f"{c['images']} x 576\n{c['tokens']['plain causal']} tokens" for c in cases]
    ways = cases[0]["ratio_to_plain"]
    _bars(axes, groups, {name: [c["ratio_to_plain"][name] for c in cases] for name in ways}, "%.2f")
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set_ylabel("seconds of a step / plain causal")
    model = result["model"]
    axes.set_title(f"a training step, layers: {model['layers']}, width: {model['hidden']}")
    axes.set_ylim(0, 1.15 * max(max(c["ratio_to_plain"].values()) for c in cases))
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def _inference(result: Mapping[str, Any], plt: Any) -> Any:
    if "first_token" not in result:
        return _counted(result, plt)
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    first = result["first_token"][0]
    ways = ("no cache", "full caching", "VoCo", "floor")
    panels = (
        (grid[0][0], {w: 1000 * first["seconds"][w] for w in ways}, "ms to the first token, one prompt"),
        (grid[0][1], {w: first["flops"][w] / 1e9 for w in ways}, "GFLOPs to the first token"),
    )
    for axes, values, title in panels:
        _columns(axes, values, title)
    decoded = result["decode"]
    groups = [", ".join(f"{k} {v}" for k, v in _rows(d).items()) for d in decoded]
    series = {w: [d["tokens_per_second"].get(w) for d in decoded] for w in ("full caching", "VoCo", "floor")}
    _bars(grid[1][0], groups, series)
    rates = [value for values in series.values() for value in values if value is not None]
    _logarithmic(grid[1][0], rates)
    grid[1][0].set_title("tokens decoded a second, by batch")
    _requests(grid[1][1], result["requests"])
    for axes in grid[1]:
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    figure.suptitle(
        f"{result['settings']['shape']}: one image of {result['vision_tokens']} tokens", fontsize=11
    )
    return figure


def _rows(entry: Mapping[str, Any]) -> dict[str, int]:
    """The batch of an entry, said once where all ways have the same."""
    rows = entry["rows"]
    return (
        {"batch": rows["VoCo"]}
        if len(set(rows.values())) == 1
        else {k: rows[k] for k in rows if k != "floor"}
    )


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis with plain numbers, and room for values and a legend."""
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 2, max(values) * 4)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _columns(axes: Any, values: Mapping[str, float], title: str) -> None:
    """One bar a way, on a logarithmic axis that leaves room for the numbers."""
    bars = axes.bar(list(values), list(values.values()), 0.6, color=[COLOURS.get(w) for w in values])
    axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=1)
    _logarithmic(axes, list(values.values()))
    axes.set_title(title)
    _bare(axes)


def _requests(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    for way in ("no cache", "full caching", "VoCo"):
        points = [
            (e["images"], e["requests_per_second"][way]) for e in entries if way in e["requests_per_second"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=way, color=COLOURS[way])
    axes.set_xscale("log")
    _logarithmic(axes, [rate for e in entries for rate in e["requests_per_second"].values()])
    axes.set_xticks([e["images"] for e in entries], [str(e["images"]) for e in entries])
    axes.minorticks_off()
    axes.set_xlabel("images in the prompt")
    axes.set_title(f"requests a second, {entries[0]['answer_tokens']} tokens answered")
    _bare(axes)


def _counted(result: Mapping[str, Any], plt: Any) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    counted = result["counted_flops"]
    _columns(left, {w: counted[w] / 1e12 for w in ("no cache", "full caching", "VoCo", "floor")}, "TFLOPs")
    held = result["storage"]["bytes"]
    _columns(right, {w: held[w] / 1e6 for w in ("full caching", "VoCo")}, "MB an image")
    figure.suptitle(f"{result['settings']['shape']}: to the first token, counted", fontsize=11)
    return figure


def _context(result: Mapping[str, Any], plt: Any) -> Any:
    rows = result["rows"]
    known = sorted({row["num_tokens"] for row in rows})
    shown = 2 if 2 in known else known[0]  # the paper's number for video
    rows = [row for row in rows if row["num_tokens"] == shown]
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(rows) + 1.4), layout="constrained")
    ways = list(rows[0]["frames"])
    height = 0.8 / len(ways)
    for number, way in enumerate(ways):
        at = [i - 0.4 + height * (number + 0.5) for i in range(len(rows))]
        bars = axes.barh(at, [r["frames"][way] for r in rows], height * 0.92, label=way, color=COLOURS[way])
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=2)
    axes.set_yticks(range(len(rows)), [f"{r['family']}, {r['what']}\n{r['context']:,} tokens" for r in rows])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xscale("log")
    axes.set_xlim(1, 4 * max(r["frames"]["VoCo, compact"] for r in rows))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(f"frames that fit, beside {rows[0]['text_tokens']} text tokens (K = {shown})")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
