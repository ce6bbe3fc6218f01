"""The examples run, at tiny size, as their first lines say."""

# ruff: noqa: F811  (the fixture of another test file)

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

from paths import ROOT


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """An example's `main`."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the processes that it starts
    return lambda name: importlib.import_module(name).main


@pytest.fixture
def model_and_images(world: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    monkeypatch.chdir(world)
    (model,) = {p.parent for p in (world / "runs").glob("*/voco_config.json")}
    return str(model), next((world / "runs/gridworld/images").rglob("*.png")).parent


def test_answer_from_store(example, model_and_images, tmp_path):
    model, images = model_and_images
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(images.iterdir())[:5]:
        (few / path.name).write_bytes(path.read_bytes())
    (few / "again.png").write_bytes((few / sorted(p.name for p in few.iterdir())[0]).read_bytes())
    words = [model, str(few), "--store", str(tmp_path / "store"), "--question", "What?", "--question", "Why?"]
    first = example("answer_from_store")(words)
    second = example("answer_from_store")(words)
    assert (first["images"], first["compressed"], second["compressed"]) == (6, 5, 0)
    assert len(first["answers"]) == 12 and first["answers"] == second["answers"]


@pytest.mark.matrix
def test_mix_runs(example, model_and_images, tmp_path):
    model, images = model_and_images
    paths = [str(p) for p in sorted(images.iterdir())[:2]]
    found = example("mix_runs")([model, *paths, "--folder", str(tmp_path / "caches"), "--orders", "2"])
    assert found["files"] == found["orders"] == 2
    assert found["difference"] <= 1e-4


def test_long_chat(example, model_and_images, tmp_path, capsys):
    model, images = model_and_images
    words = [model, str(images), "--images", "50", "--store", str(tmp_path / "store")]
    found = example("long_chat")([*words, "--max-new-tokens", "3"])
    assert found["turns"] == 11 - 1 and found["images"] == 50
    later = found["read"][1:]
    assert max(later) <= min(later) + 4, "a turn reads its own tokens, however long the conversation is"
    assert "saved and restored" in capsys.readouterr().out


NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"


def test_the_notebook_is_kept_without_what_it_printed():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "clear all outputs, and save"


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install '.[test]'")
    nbformat = pytest.importorskip("nbformat", reason="comes with nbclient")
    for name, value in {"PYTHONPATH": _paths(), "WALKTHROUGH_STEPS": "2", "WALKTHROUGH_IMAGES": "12"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    told = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 2, "an image of the set, and its mask"
    assert "16 vision tokens are kept as 1 VoCo token" in told
    assert "was not made by this model under this rule" in told
    assert {"both.safetensors", "talk.safetensors", "mask.png"} <= {path.name for path in tmp_path.iterdir()}


def _paths() -> str:
    """The checkout first, then what this process finds its packages by."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
