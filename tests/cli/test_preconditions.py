"""What a command needs is asked before it works, in the words of the command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import error_of, out_of
from paths import ROOT
from voco_plugin.cli import main, preconditions, recipe_keys
from voco_plugin.cli.evaluate import base_hint
from voco_plugin.cli.flags import as_flags
from voco_plugin.cli.recipe import RecipeError, _names, load, schema
from voco_plugin.cli.train import image_folder_for
from voco_plugin.registry import encoders


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train gridworld_voco --learnin_rate 3", "unknown key 'learnin_rate' (did you mean 'learning_rate'"),
        (
            "train gridworld_voco",
            "before: `voco gridworld runs/gridworld --base runs/gridworld_base`",
        ),
        (
            "train gridworld_voco --model_name_or_path a/b",
            "dataset_name runs/gridworld/train.json does not",
        ),
        ("study gridworld_table1", "What comes before: `voco gridworld runs/gridworld_study --level study"),
        (
            "study gridworld_table1 --set model=a/b --set data=x.json",
            "data x.json does not exist; write",
        ),
    ],
)
def test_what_is_missing_is_said_before_torch_is_imported(command: str, message: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom voco_plugin.cli import main\nstatus = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_value_of_the_users_own_brings_no_command_of_the_recipe(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    said = error_of(capsys, "train", "gridworld_voco", "--model_name_or_path", "./mine")
    assert "model ./mine does not exist" in said and "What comes before" not in said


def test_keys_read_off_the_sources_are_those_of_the_classes(monkeypatch) -> None:
    assert _names() == set(schema())
    recipe_keys.field_names.cache_clear()
    monkeypatch.setitem(recipe_keys._ROOTS, "TrainingArguments", ("transformers", "gone.py"))
    try:
        assert _names() is None, "a source that is laid out otherwise: the check waits for the import"
        with pytest.raises(RecipeError, match="unknown key 'learnin_rate'"):
            load("gridworld_voco", ["--learnin_rate", "3"])
    finally:
        recipe_keys.field_names.cache_clear()


# -- packages and places


@pytest.fixture
def without(monkeypatch):
    """``without(*modules)``: these are not installed."""

    def missing(*modules: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            preconditions.importlib.util, "find_spec", lambda name: None if name in modules else find(name)
        )

    return missing


@pytest.mark.parametrize("module", ["timm", "open_clip"])
def test_gridworld_asks_for_its_packages_before_it_writes(module, without, tmp_path, capsys) -> None:
    without(module)
    more = ["--num-train", "2", "--num-test", "2", "--parts", str(tmp_path / "parts")]
    said = error_of(capsys, "gridworld", str(tmp_path / "g"), *more)
    assert f"needs {module}: pip install 'voco_plugin[backbones]'" in said
    assert not list(tmp_path.iterdir())


def test_gridworld_keeps_the_earlier_set_where_it_cannot_write_another(without, tmp_path, capsys) -> None:
    made = [str(tmp_path / "g"), "--num-train", "2", "--num-test", "2"]
    out_of(capsys, "gridworld", *made)
    without("sklearn")
    assert "needs sklearn" in error_of(capsys, "gridworld", *made, "--overwrite")
    assert (tmp_path / "g" / "train.json").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "m", "--data", "d.json"],
        ["bench", "context"],
        ["inspect", "--layout", "t1 v4 c1"],
        ["bench", "context", "--plot"],
    ],
)
def test_a_file_that_could_not_be_written_is_refused_at_once(command, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    option = command.pop() if command[-1].startswith("--") else "--out"
    assert f"{option} {tmp_path} is a folder" in error_of(capsys, *command, option, str(tmp_path))
    Path("file").touch()
    assert f"{option}: file is a file, not a folder" in error_of(capsys, *command, option, "file/x")


# -- the words of the command line


def test_messages_name_flags_as_they_are_typed() -> None:
    parser = argparse.ArgumentParser()
    for option in ("--image-folder", "--num-train", "--overwrite", "--colors", "--on-bad-sample"):
        parser.add_argument(option)
    for text, wanted in {
        "set image_folder to where": "set --image-folder to where",
        "pass overwrite=True, or": "pass --overwrite, or",
        "num_train=0 is out of range": "--num-train 0 is out of range",
        "num_colors=9 is too many": "--colors 9 is too many",
        "(on_bad_sample: skip)": "(--on-bad-sample skip)",
        "give image_folder.": "give --image-folder.",
        "/data/image_folder/a.png, 'num_train', x.num_train, --num-train": None,
        "it would overwrite colors": None,
    }.items():
        assert as_flags(text, parser, {"num_colors": "--colors"}) == (wanted or text)


def test_commands_answer_with_flags(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    talk = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "y"}]
    Path("d.json").write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": talk}]))
    assert "set --image-folder to where" in error_of(capsys, "eval", "m", "--data", "d.json")
    assert "--colors 99 is out of range" in error_of(capsys, "gridworld", "g", "--colors", "99")
    assert "--frames 0 is out of range" in error_of(capsys, "gridworld", "g", "--video", "--frames", "0")
    made = ["gridworld", "g", "--num-train", "2", "--num-test", "2"]
    assert main(made) == 0
    assert "pass --overwrite, or give another folder" in error_of(capsys, *made)


def test_a_base_that_answers_nothing_is_no_upper_bound(tmp_path) -> None:
    (tmp_path / "adapter_config.json").touch()
    zero = {"mode": "base", "accuracy": 0.0}
    assert (
        base_hint({"base": {"mode": "base", "accuracy": 0.1}, "voco": {**zero, "mode": "voco"}}, "m") is None
    )
    assert "the model that this adapter was trained on" in (base_hint({"base": zero}, str(tmp_path)) or "")
    assert "the model without VoCo answers no question" in (base_hint({"base": zero}, "m") or "")


# -- no noise


def test_a_recipes_image_folder_is_no_warning_with_another_data_set() -> None:
    typed = ["gridworld_voco", "--dataset_name", "org/set"]
    assert image_folder_for("org/set", "data", typed) is None
    assert image_folder_for("other.json", "data", ["r", "--dataset_name", "other.json"]) == "data"
    assert image_folder_for("org/set", "data", [*typed, "--image_folder", "data"]) == "data", "warned of"
    assert image_folder_for("org/set", "data", None) == image_folder_for("x", "data", ["r"]) == "data"


# -- plugins


def test_a_plugin_is_looked_for_beside_its_recipe_then_here(tmp_path, monkeypatch) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    recipes.mkdir(), here.mkdir()
    line = "from voco_plugin.registry import encoders\nencoders.register('{}', object())\n"
    (recipes / "r.yaml").write_text("plugin: [own_one.py, there_one.py]\n")
    (recipes / "own_one.py").write_text(line.format("beside_the_recipe"))
    (here / "there_one.py").write_text(line.format("in_the_working_folder"))
    (here / "own_one.py").write_text(line.format("not_this"))
    monkeypatch.chdir(here)
    found = load(str(recipes / "r.yaml"))
    assert found.values["plugin"] == [str(recipes / "own_one.py"), "there_one.py"]
    names = {"beside_the_recipe", "in_the_working_folder"}
    try:
        assert names <= set(encoders._entries) and "not_this" not in encoders._entries
        load(str(recipes / "r.yaml"), ["--plugin", "own_one.py"])  # typed: from the working folder
        assert "not_this" in encoders._entries
    finally:
        for name in (*names, "not_this"):
            encoders._entries.pop(name, None)
    (recipes / "r.yaml").write_text("plugin: gone.py\n")
    with pytest.raises(RecipeError, match=r"line 1: plugin gone.py does not exist.*nor does .*/gone.py"):
        load(str(recipes / "r.yaml"))
