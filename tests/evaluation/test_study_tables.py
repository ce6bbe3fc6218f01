"""Tables and pictures of a study: every number again by hand, from records written by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies import planner, run
from voco_plugin.evaluation.study.definition import Study
from voco_plugin.evaluation.study.figures import Figures
from voco_plugin.evaluation.study.results import read_search, write_results, write_search
from voco_plugin.evaluation.study.tables import page, percent, tokens, with_interval

TYPES = ["colour", "colour", "count", "sum"] * 10
ROWS = [q // 4 for q in range(40)]
METHODS = {
    "upper": {"bound": "upper"}, "voco": {"label": "VoCo"}, "star": {"voco.rule": "star"},
    "lower": {"bound": "lower"}, "blind": {"bound": "blind"},
}  # fmt: skip
RIGHT = {  # method → seed → how many of each group of four questions are right: the first so many
    "upper": {0: 4, 1: 4}, "voco": {0: 2, 1: 3}, "star": {0: 3, 1: 3}, "lower": {0: 1, 1: 1},
    "blind": {None: 0},
}  # fmt: skip


def entry(correct: str, k: int | None, name: str = "test", cached: bool = False) -> dict[str, Any]:
    cache = {"bytes": 100.0 * (k or 0), "tokens": k, "vision_tokens": 16} if cached else None
    return {"mode": "voco", "num_tokens": k, "correct": correct, "set": name, "cache": cache}


def record(method: str, seed: int | None, scores: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    k = None if seed is None else scores[0]["num_tokens"]
    trains = method not in ("lower", "blind", "base")
    training = {
        "train_runtime": 10.0 + (seed or 0), "steps": 8, "resumed_at": 0, "trained_parameters": 12345
    }  # fmt: skip
    return {
        "name": f"{method}-s{seed}", "method": method, "num_tokens": k, "seed": seed, "tried": {},
        "curve": [], "scores": scores, "training": training if trains else None, "environment": None,
        "commands": [], **more,
    }  # fmt: skip


def by_hand(**changes: Any) -> Figures:
    records = []
    for method, seeds in RIGHT.items():
        for seed, right in seeds.items():
            correct = ("1" * right + "0" * (4 - right)) * 10
            k = None if method == "blind" else 1
            records.append(record(method, seed, [entry(correct, k, cached=method in ("voco", "lower"))]))
    study = Study.from_dict({"recipe": "r", "eval_data": "t", "seeds": [0, 1], "methods": METHODS, **changes})
    return Figures(study, records, {"test": {"types": TYPES, "rows": ROWS}}, resamples=400)


def row_of(figures: Figures, method: str, k: int | None = 1) -> Any:
    return next(row for row in figures.rows if (row.method, row.num_tokens) == (method, k))


def test_means_ratios_and_columns_are_those_by_hand() -> None:
    figures = by_hand()
    voco = row_of(figures, "voco")
    assert voco.per_seed == [0.5, 0.75] and voco.accuracy == 0.625
    assert voco.raw == 0.625 and voco.retention == pytest.approx((0.625 - 0.25) / (1 - 0.25))
    # by type: both colours are always right, the count with seed 1, the sum never
    assert voco.columns == {"colour": 1.0, "count": 0.5, "sum": 0.0}
    assert voco.column_raw == {"colour": 1.0, "count": 0.5, "sum": 0.0}
    # the lower bound has every first of two colours: 50 %
    assert voco.column_retention == {"colour": 1.0, "count": 0.5, "sum": 0.0}
    assert row_of(figures, "lower").columns["colour"] == 0.5
    assert row_of(figures, "upper").retention == 1 and row_of(figures, "lower").retention == 0
    assert row_of(figures, "blind", None).retention == pytest.approx(-1 / 3)
    assert voco.train_seconds == 10.5 and voco.trained_parameters == 12345


def test_bytes_are_measured_or_those_of_as_many_tokens() -> None:
    figures = by_hand()
    assert row_of(figures, "voco").cache_bytes == 100
    assert row_of(figures, "star").cache_bytes == 100, "not read from a cache: 100 a token"
    assert row_of(figures, "upper").cache_bytes == 1600, "16 vision tokens"
    assert row_of(figures, "lower").cache_bytes is None and row_of(figures, "blind", None).cache_bytes is None


def test_intervals_are_of_replicates_that_share_their_questions() -> None:
    figures = by_hand()
    upper = row_of(figures, "upper")
    assert upper.raw_interval == (1, 1) and upper.retention_interval == (1, 1)
    voco = row_of(figures, "voco")
    assert voco.accuracy_interval[0] < 0.5 and voco.accuracy_interval[1] > 0.75, "seeds and questions"
    assert voco.retention_interval[0] < voco.retention < voco.retention_interval[1]


def test_differences_are_paired_and_say_what_is_clear() -> None:
    (one,) = by_hand().differences
    assert (one.method, one.reference, one.num_tokens) == ("star", "voco", 1)
    assert one.difference == pytest.approx(0.125) and one.interval[0] <= 0 and not one.clear
    (one,) = by_hand(reference="star").differences
    assert one.method == "voco" and one.difference == pytest.approx(-0.125)


def test_resampling_images_draws_all_their_questions() -> None:
    """Each image has the same two or three right answers: between images nothing varies, seeds alone do."""
    star = row_of(by_hand(resample="images"), "star")
    assert star.accuracy_interval == (0.75, 0.75)
    questions = row_of(by_hand(), "star").accuracy_interval
    assert questions[0] < 0.75 < questions[1]


def test_several_sets_average_their_ratios_as_the_paper_does() -> None:
    sets = {"a": {"data": "a"}, "b": {"data": "b"}}
    methods = {"upper": {"bound": "upper"}, "voco": None, "lower": {"bound": "lower"}}
    shares = {"upper": (8, 4), "voco": (6, 3), "lower": (2, 2)}  # of ten, in a and in b
    records = [
        record(m, 0, [entry("1" * n + "0" * (10 - n), 1, s) for n, s in zip(right, "ab", strict=True)])
        for m, right in shares.items()
    ]
    study = Study.from_dict({"recipe": "r", "eval_data": sets, "methods": methods})
    questions = {s: {"types": ["all"] * 10, "rows": list(range(10))} for s in "ab"}
    figures = Figures(study, records, questions, resamples=200)
    voco = row_of(figures, "voco")
    assert voco.accuracy == pytest.approx(0.45) and voco.columns == {"a": 0.6, "b": 0.3}
    assert voco.raw == pytest.approx((0.6 / 0.8 + 0.3 / 0.4) / 2)
    assert voco.retention == pytest.approx(((6 - 2) / (8 - 2) + (3 - 2) / (4 - 2)) / 2)
    assert voco.retention_interval is None, "in b the bounds meet in some replicate"


def test_the_bound_of_the_same_k_is_taken_else_the_smallest() -> None:
    methods = {"upper": {"bound": "upper"}, "voco": None, "lower": {"bound": "lower"}}
    correct = {
        ("upper", 1): 36,
        ("lower", 1): 4,
        ("lower", 2): 12,
        ("voco", 1): 20,
        ("voco", 2): 20,
        ("voco", 4): 20,
    }
    records = [record(m, 0, [entry("1" * n + "0" * (40 - n), k)]) for (m, k), n in correct.items()]
    study = Study.from_dict({"recipe": "r", "eval_data": "t", "methods": methods, "num_tokens": [1, 2, 4]})
    figures = Figures(study, records, {"test": {"types": TYPES, "rows": ROWS}}, resamples=50)
    assert row_of(figures, "voco", 1).retention == pytest.approx(16 / 32)
    assert row_of(figures, "voco", 2).retention == pytest.approx(8 / 24)
    assert row_of(figures, "voco", 4).retention == pytest.approx(16 / 32)


def test_the_bounds_draw_the_same_seeds_since_one_reads_the_others_checkpoint() -> None:
    """Seeds far apart, the gap between the bounds the same in each: drawn apart, the bounds would meet."""
    methods = {"upper": {"bound": "upper"}, "voco": None, "lower": {"bound": "lower"}}
    right = {"upper": (36, 20), "voco": (30, 14), "lower": (24, 8)}
    records = [
        record(m, seed, [entry("1" * n + "0" * (40 - n), 1)])
        for m, by_seed in right.items()
        for seed, n in enumerate(by_seed)
    ]
    study = Study.from_dict({"recipe": "r", "eval_data": "t", "methods": methods, "seeds": [0, 1]})
    figures = Figures(study, records, {"test": {"types": TYPES, "rows": ROWS}}, resamples=400)
    assert row_of(figures, "voco").retention_interval is not None
    assert row_of(figures, "lower").retention_interval == (0, 0)


def test_sets_draw_their_questions_apart_and_their_seeds_together() -> None:
    """Two sets with the same answers: as independent sets, their average varies less than one of them."""
    methods = {"voco": None}
    half = "10" * 200
    questions = {s: {"types": ["all"] * 400, "rows": list(range(400))} for s in "ab"}

    def width(sets: str, by_seed: list[str]) -> float:
        study = Study.from_dict(
            {"recipe": "r", "eval_data": {s: {"data": s} for s in sets}, "methods": methods, "seeds": [0, 1]}
        )
        records = [record("voco", i, [entry(c, 1, s) for s in sets]) for i, c in enumerate(by_seed)]
        (row,) = Figures(study, records, {s: questions[s] for s in sets}, resamples=1000).rows
        return row.accuracy_interval[1] - row.accuracy_interval[0]

    assert width("ab", [half, half]) == pytest.approx(width("a", [half, half]) / 2**0.5, rel=0.1)
    assert width("ab", ["1" * 400, "0" * 400]) == width("a", ["1" * 400, "0" * 400]) == 1


def test_records_of_other_questions_are_refused() -> None:
    study = Study.from_dict({"recipe": "r", "eval_data": "t", "methods": {"voco": None}})
    with pytest.raises(ValueError, match="voco-s0 answered 3 questions of test, others 40"):
        Figures(study, [record("voco", 0, [entry("101", 1)])], {"test": {"types": TYPES, "rows": ROWS}})


def test_a_training_that_went_on_has_the_seconds_of_a_whole_one_and_is_marked() -> None:
    half = {"train_runtime": 6.0, "steps": 8, "resumed_at": 4, "trained_parameters": 5}
    records = [record("voco", 0, [entry("10" * 20, 1)], training=half)]
    study = Study.from_dict({"recipe": "r", "eval_data": "t", "methods": {"voco": None}})
    figures = Figures(study, records, {"test": {"types": TYPES, "rows": ROWS}}, resamples=10)
    (row,) = figures.rows
    assert row.train_seconds == 12.0 and row.scaled and row.raw is None and row.retention is None
    text = "\n".join(page("x", study, figures, command="voco study x").parts)
    assert "| 12* |" in text and "went on" in text


def test_the_page_holds_every_number(here: Path) -> None:  # noqa: F811
    figures = by_hand()
    text = "\n\n".join(page("x", figures.study, figures, command="voco study x").parts)
    voco = row_of(figures, "voco")
    line = next(line for line in text.splitlines() if line.startswith("| VoCo | 1 | 50.0, 75.0 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "VoCo", "1", "50.0, 75.0", with_interval(0.625, voco.accuracy_interval),
        with_interval(0.625, voco.raw_interval), with_interval(0.5, voco.retention_interval), "100 B",
        "12,345", "10",
    ]  # fmt: skip
    assert "| VoCo | 1 | 100 | 50 | 0 |" in text and "| VoCo | 1 | 100 / 100 | 50 / 50 | 0 / 0 |" in text
    assert "not told apart" in text and "40 questions" in text
    assert percent(None) == "–" and percent(0.8369) == "83.7" and with_interval(0.5, None) == "50.0"


def test_a_row_read_at_another_k_says_so() -> None:
    row = row_of(by_hand(), "voco")
    row.trained_tokens, row.num_tokens = 16, 4
    assert tokens(row) == "16 → 4"
    row.bound = "lower"
    assert tokens(row) == "4"


# -- the whole folder ----------------------------------------------------------------------------------------


def write(folder: Path, plan: Any, chosen: Any = (), **more: Any) -> dict[str, Any]:
    return write_results(
        folder / "results", "small", plan.study, plan.runs(dict(chosen)), command="voco study small",
        definition={}, **more,
    )  # fmt: skip


def test_the_results_folder_is_made_of_its_runs_alone(here: Path) -> None:  # noqa: F811
    plan = planner(here, curve=[2, 4], curve_images=20)
    run(here, plan)
    result = write(here, plan)
    accuracies = []
    for seed in (0, 1):
        made = json.loads((here / "results" / "runs" / f"voco-k2-s{seed}.json").read_text())
        accuracies.append(statistics.mean(map(int, made["scores"][0]["correct"])))
    row = next(r for r in result["rows"] if (r["method"], r["num_tokens"]) == ("voco", 2))
    assert row["per_seed"] == pytest.approx(accuracies, abs=1e-6)
    assert row["accuracy"] == pytest.approx(statistics.mean(accuracies), abs=1e-6)
    upper = next(r for r in result["rows"] if r["method"] == "upper")
    assert row["raw"] == pytest.approx(row["accuracy"] / upper["accuracy"], abs=1e-5)
    lower = next(r for r in result["rows"] if (r["method"], r["num_tokens"]) == ("lower", 2))
    kept = (row["accuracy"] - lower["accuracy"]) / (upper["accuracy"] - lower["accuracy"])
    assert row["retention"] == pytest.approx(kept, abs=1e-5)
    assert row["cache_bytes"] == 200 and not result["missing"]
    curve = next(c for c in result["curves"] if (c["method"], c["num_tokens"]) == ("voco", 1))
    assert set(curve["accuracy"]) == {"2", "4"} and len(curve["accuracy"]["2"]) == 2
    pictures = {path.name for path in (here / "results").glob("*.png")}
    assert pictures == {"k.png", "methods.png", "steps.png", "costs.png"}
    text = (here / "results" / "tables.md").read_text()
    assert all(f"]({name})" in text for name in pictures)
    before = (here / "results" / "results.json").read_bytes()
    # elsewhere, without base, data, trainings and readings
    for name in ("base", "work"):
        (here / name).rename(here / f"gone-{name}")
    (here / "results").rename(here / "moved")
    (here / "results").symlink_to("moved")
    elsewhere = planner(here, curve=[2, 4], curve_images=20)
    elsewhere.fingerprint = lambda source: f"name:{source}"
    write(here, elsewhere, by="values_key")
    assert (here / "results" / "results.json").read_bytes() == before


def test_a_changed_definition_leaves_old_runs_out_and_says_so(here: Path) -> None:  # noqa: F811
    run(here, planner(here))
    told: list[str] = []
    changed = planner(here, overrides={"max_steps": 6})
    result = write(here, changed, tell=told.append)
    assert {r["method"] for r in result["rows"]} == {"base", "blind"}
    assert len(result["missing"]) == 10 and told[0].startswith(
        "left out, made under another definition: upper-k1-s0"
    )
    assert "**Not finished: upper-k1-s0" in (here / "results" / "tables.md").read_text()


def test_a_search_is_shown_with_what_it_chose(here: Path) -> None:  # noqa: F811
    plan = planner(here, search={"over": {"learning_rate": [1e-3, 2e-3]}, "last": 10})
    run(here, plan, found=lambda tried: write_search(here / "results", plan.rows, tried))
    rows, tried = read_search(here / "results")
    assert rows == 100 and len(tried) == 4
    chosen = {one["method"]: one["tried"] for one in tried if one["chosen"]}
    gone = {**tried[0], "method": "gone"}  # a method that the study has no longer
    assert write(here, plan, chosen, search=[*tried, gone])["search"] == tried
    text = (here / "results" / "tables.md").read_text()
    assert text.count("chosen |") == 2 and "validation accuracy %" in text
    shown = f"{chosen['voco']['learning_rate']:g}"
    assert any(
        line.startswith("| voco | 1 |") and line.endswith(f"| {shown} |") for line in text.splitlines()
    )


def test_an_empty_study_says_that_nothing_is_finished(here: Path) -> None:  # noqa: F811
    plan = planner(here)
    result = write(here, plan)
    assert result["rows"] == [] and len(result["missing"]) == 12
    assert "No run is finished." in (here / "results" / "tables.md").read_text()


def test_pareto_front_keeps_what_nothing_beats() -> None:
    from voco_plugin.evaluation.study.charts import _front

    points = [(1, 0.3), (2, 0.2), (2, 0.5), (4, 0.5), (8, 0.9)]
    assert _front(points) == [(1, 0.3), (2, 0.5), (8, 0.9)]


def test_types_are_counted_as_the_questions_say() -> None:
    figures = by_hand()
    star = row_of(figures, "star")
    correct = np.array([1, 1, 1, 0] * 10)
    expected = {kind: correct[np.array(TYPES) == kind].mean() for kind in ("colour", "count", "sum")}
    assert star.columns == pytest.approx(expected)
