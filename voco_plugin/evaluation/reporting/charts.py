"""Loss curves and bar charts, with matplotlib (extra ``quickstart``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import atomic_path


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("charts need matplotlib: pip install 'voco_plugin[quickstart]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: str | Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    _pyplot().close(figure)
    return Path(path)


def draw_losses(
    curves: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, title: str = ""
) -> Path:
    """Curves name → ``(step, loss)`` points, on a logarithmic loss axis.

    Raises:
        ValueError: there is no point to draw.
    """
    if not any(len(points) for points in curves.values()):
        raise ValueError("no losses to draw: the log holds none (logging_steps larger than the run?)")
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in curves.items():
        if points:
            axes.plot([p[0] for p in points], [p[1] for p in points], label=name, linewidth=1.6)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(lambda value, _: f"{value:g}")
    axes.grid(True, which="both", alpha=0.25)
    axes.set_title(title or "training loss")
    axes.legend(frameon=False)
    return _save(figure, path)


def draw_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    title: str = "",
    unit: str = "%",
) -> Path:
    """Grouped bars: one group per name in ``groups``, one bar per entry of ``series`` (values in ``unit``).

    Raises:
        ValueError: a series has not one value per group.
    """
    for name, values in series.items():
        if len(values) != len(groups):
            raise ValueError(f"series {name!r} has {len(values)} values for {len(groups)} groups.")
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(max(6, 1.35 * len(groups)), 4))
    width = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        at = [i - 0.4 + width * (number + 0.5) for i in range(len(groups))]
        bars = axes.bar(at, values, width * 0.92, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(f"accuracy ({unit})")
    axes.set_ylim(0, 112 if unit == "%" else None)
    axes.set_title(title)
    axes.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def read_losses(folder: str | Path) -> list[tuple[float, float]]:
    """``(step, loss)`` of a training run's ``trainer_state.json``.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    import json

    path = Path(folder) / "trainer_state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no finished training run.")
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
