"""The studies that ship: all named, every key commented, every change accepted, equal runs shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from paths import ROOT
from voco_plugin.evaluation.study.run_keys import fingerprint


def test_studies_are_shipped_apart_from_recipes() -> None:
    from voco_plugin.cli import recipe
    from voco_plugin.cli.study_file import shipped

    at_scale = {"table1", "table2", "table3", "table4", "table5_6", "ablations"}
    small = {f"gridworld_{name}" for name in (*at_scale, "long", "rivals", "turns")}
    pretrained = {
        f"smollm2_{name}"
        for name in ("table1", "table2", "table4", "pictures_table1", "pictures_long", "gridworld_long")
    }
    assert set(shipped()) == at_scale | small | pretrained
    assert not set(shipped()) & set(recipe.shipped())


def studies() -> list[Path]:
    return sorted((ROOT / "recipes" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", studies(), ids=lambda p: p.stem)
def test_a_shipped_study_comments_every_key_and_opens_with_its_commands(path: Path) -> None:
    import re

    lines = path.read_text(encoding="utf-8").splitlines()
    assert re.match(rf"# run: +voco study {path.stem}\b", lines[2]), lines[2]
    assert re.match(rf"# change: +voco study {path.stem} --", lines[3]), lines[3]
    assert not lines[0].endswith(path.stem) and lines[0].startswith("# ")
    for number, line in enumerate(lines):
        # a section's opening line, the sets below one comment, and deeper keys of a method explain themselves
        if (
            not re.match(r"(  )?[\w.]+:", line)
            or line in ("methods:", "search:", "  over:")
            or "{data:" in line
        ):
            continue
        previous = lines[number - 1].lstrip()
        together = previous.startswith(("model:", "data:")) and line.startswith(("data:", "image_folder:"))
        assert previous.startswith("#") or together, f"{path.stem}: {line!r} has no comment"


@pytest.mark.parametrize("path", studies(), ids=lambda p: p.stem)
def test_a_shipped_study_plans_and_its_changes_are_accepted(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run's overrides are keys that the recipe has, of the right types; no model or data is needed."""
    import re

    from voco_plugin.cli.study_file import load_study, resolve
    from voco_plugin.evaluation.study.plan import Planner, units

    monkeypatch.chdir(tmp_path)
    fingerprint.cache_clear()
    lines = path.read_text(encoding="utf-8").splitlines()
    changes = re.findall(r"--set (\S+)", lines[3])
    for given in ((), changes):
        _, study = load_study(path.stem, given)
        planner = Planner(study, tmp_path, resolve, fingerprint, lambda data, split: 16000)
        guess = {one.method.name: dict(one.tried) for one in planner.candidates()}
        runs = planner.runs(guess)
        assert len({run.name for run in runs}) == len(runs)
        assert {run.method.name for run in runs} == set(study.methods)
        keys = [training.key for training, _ in units(runs) if training is not None]
        assert len(set(keys)) == len(keys)
        if study.upper is not None:
            trained = {r.training.key for r in runs if r.training and r.method.bound != "upper"}
            upper = {r.training.key for r in runs if r.training and r.method.bound == "upper"}
            assert not trained & upper


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [("gridworld_table1", "gridworld_table2", {"upper", "voco", "seeded", "avg_pool"}),
     ("gridworld_table1", "gridworld_ablations", {"upper", "voco"}),
     ("gridworld_table2", "gridworld_table4", {"upper", "voco"}), ("table1", "table2", {"upper", "voco"}),
     ("table1", "ablations", {"upper", "voco"}),
     ("smollm2_table1", "smollm2_table2", {"upper", "voco", "seeded", "avg_pool"}),
     ("smollm2_table1", "smollm2_table4", {"upper", "voco"})],
)  # fmt: skip
def test_shipped_studies_share_what_they_have_in_common(
    first: str, second: str, shared: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from voco_plugin.cli.study_file import load_study, resolve
    from voco_plugin.evaluation.study.plan import Planner

    monkeypatch.chdir(tmp_path)
    keys = []
    for name in (first, second):
        _, study = load_study(name)
        planner = Planner(study, tmp_path, resolve, fingerprint, lambda data, split: 16000)
        guess = {one.method.name: {"learning_rate": 1e-3} for one in planner.candidates()}
        keys.append({(r.method.name, r.training.key) for r in planner.runs(guess) if r.training})
    assert shared <= {name for name, _ in keys[0] & keys[1]}
