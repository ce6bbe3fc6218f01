"""Small studies whose children are `fake_voco.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from paths import HELPERS
from voco_plugin.evaluation.study.child_processes import Children
from voco_plugin.evaluation.study.definition import Study
from voco_plugin.evaluation.study.plan import Planner
from voco_plugin.evaluation.study.run_keys import fingerprint
from voco_plugin.evaluation.study.runner import Runner

FAKE = (sys.executable, "-S", str(HELPERS / "fake_voco.py"))


SMALL: dict[str, Any] = {
    "recipe": "r", "model": "base", "data": "train.json", "eval_data": "test.json",
    "overrides": {"max_steps": 4}, "seeds": [0, 1], "num_tokens": [1, 2],
    "methods": {
        "upper": {"bound": "upper", "num_tokens": [1]}, "voco": None, "lower": {"bound": "lower"},
        "base": {"bound": "base"}, "blind": {"bound": "blind"},
    },
}  # fmt: skip


def resolve(recipe: str, words: Any) -> dict[str, Any]:
    """A recipe without any check: what was given, and two keys of its own."""
    values: dict[str, Any] = {"warmup_steps": 7, "logging_steps": 10, "voco": {}}
    for key, text in zip(words[::2], words[1::2], strict=True):
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        target, *inner = key.removeprefix("--").split(".")
        if inner:
            values[target] = {**values[target], inner[0]: value}
        else:
            values[target] = value
    return values


def planner(folder: Path, values: dict[str, Any] | None = None, **changes: Any) -> Planner:
    study = Study.from_dict({**(values or SMALL), **changes})
    return Planner(study, folder / "work", resolve, fingerprint, lambda data, split: 100)


def run(folder: Path, plan: Planner, **options: Any) -> Runner:
    tell = options.pop("tell", lambda line: None)
    results = folder / options.pop("results", "results")
    made = Runner(plan, results, Children(program=FAKE), tell=tell, **options)
    made.run()
    return made


def journal(folder: Path) -> list[str]:
    path = folder / "journal"
    return path.read_text().splitlines() if path.is_file() else []


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``folder`` as the working folder of a study: base model, data, and the journal of its children."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FAKE_JOURNAL", str(folder / "journal"))
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    for name in ("train.json", "test.json"):
        (folder / name).write_text("[]")
    fingerprint.cache_clear()
    return folder
