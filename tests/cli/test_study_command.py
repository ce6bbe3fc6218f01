"""`voco study` on the command line, with children that take no time; what `train` and `eval` do for it.

`test_a_tiny_study_end_to_end` (slow) runs the real commands.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import voco_plugin as vp
from commands import error_of, out_of
from studies import FAKE, journal, prepare
from voco_plugin.cli import main
from voco_plugin.evaluation.study import child_processes

YAML = """
# A small study.
recipe: gridworld_voco
model: base
data: train.json
eval_data: test.json
overrides: {max_steps: 4}
seeds: [0, 1]
methods:
  upper: {bound: upper}
  voco: {}
  star: {voco.rule: star}
  lower: {bound: lower}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = prepare(tmp_path, monkeypatch)
    monkeypatch.setattr(child_processes, "VOCO", FAKE)
    (folder / "small.yaml").write_text(YAML)
    return folder


def test_a_study_prints_its_table_and_names_its_folder(here: Path, capsys: Any) -> None:
    text = out_of(capsys, "study", "small.yaml", "--jobs", "2")
    lines = [line.split() for line in text.splitlines()]
    assert [line[:2] for line in lines[2:6]] == [["upper", "1"], ["voco", "1"], ["star", "1"], ["lower", "1"]]
    assert lines[-1] == ["runs/results/small/tables.md"]
    result = json.loads(Path("runs/results/small/results.json").read_text())
    assert result["command"] == "voco study small" and result["definition"]["seeds"] == [0, 1]
    assert len(result["commands"]) == 8 and result["failed"] == result["missing"] == []
    assert "[6/14]" not in text, "progress goes to stderr"


def test_a_shipped_study_is_found_by_its_name_and_listed(here: Path, capsys: Any) -> None:
    text = out_of(capsys, "study", "--list")
    assert "gridworld_table1" in text and "table5_6" in text
    found = json.loads(out_of(capsys, "study", "--list", "--json"))
    assert all(Path(one["path"]).is_file() and one["summary"] for one in found)


def test_list_says_how_far_each_run_is(here: Path, capsys: Any) -> None:
    before = json.loads(out_of(capsys, "study", "small.yaml", "--list", "--json"))
    assert {one["state"] for one in before} == {"to do"} and len(before) == 8
    out_of(capsys, "study", "small.yaml", "--only", "voco-k1-s0")
    text = out_of(capsys, "study", "small.yaml", "--list")
    assert text.count("finished") == 1 and text.count("to do") == 7
    assert out_of(capsys, "study", "small.yaml", "--list", "--only", "star").count("star-k1") == 2


@pytest.mark.parametrize(
    ("only", "runs"),
    [("voco", ["voco-k1-s0", "voco-k1-s1"]), ("voco-k1-s1", ["voco-k1-s1"]), ("base", ["base"]),
     ("oco-k1-s1", ["voco-k1-s1", "slow_voco-k1-s1"])],
)  # fmt: skip
def test_a_methods_whole_name_is_that_method_alone(here: Path, capsys: Any, only: str, runs: list) -> None:
    more = ("slow_voco.label=slow", "base.bound=base", "based.mode=base")
    change = [word for one in more for word in ("--set", f"methods.{one}")]
    shown = out_of(capsys, "study", "small.yaml", "--list", "--json", *change, "--only", only)
    assert [one["run"] for one in json.loads(shown)] == runs
    printed = out_of(capsys, "study", "small.yaml", "--print-commands", *change, "--only", only)
    named = [line[2:] for line in printed.splitlines() if line.startswith("# ")]
    assert ", ".join(named).split(", ") == runs  # one training is shared by those that have its values


def test_printed_commands_are_what_the_study_would_run(here: Path, capsys: Any, monkeypatch: Any) -> None:
    text = out_of(capsys, "study", "small.yaml", "--print-commands")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == 6 + 2 + 2 + 2 + 2 and text.splitlines()[0] == "# upper-k1-s0, lower-k1-s0"
    assert all(line.split()[:2] in (["voco", "train"], ["voco", "eval"]) for line in lines)
    # somebody else runs them: the study then has nothing left to do
    for line in lines:
        words = shlex.split(line)[1:]
        assert os.spawnv(os.P_WAIT, sys.executable, [*FAKE, *words]) == 0
    before = len(journal(here))
    assert out_of(capsys, "study", "small.yaml", "--print-commands").count("voco ") == 0
    out_of(capsys, "study", "small.yaml")
    assert len(journal(here)) == before


def test_a_recipe_with_a_profile_prints_accelerate_launch(here: Path, capsys: Any) -> None:
    changes = ["--set", "recipe=vicuna7b_voco_k1", "--only", "voco-k1-s0"]
    text = out_of(capsys, "study", "small.yaml", "--print-commands", *changes)
    (line,) = [line for line in text.splitlines() if "train" in line.split()]
    words = shlex.split(line)
    assert words[:3] == ["accelerate", "launch", "--config_file"] and words[3].endswith("zero3.yaml")
    assert words[words.index("--num_processes") + 1] == "8"
    assert words[words.index("--module") + 1 :][:3] == ["voco_plugin", "train", "vicuna7b_voco_k1"]
    assert words[-2:] == ["--accelerate_config", "null"], "the processes do not launch again"


def test_set_changes_any_key_of_the_study(here: Path, capsys: Any) -> None:
    changes = [
        "--set", "seeds=[3]", "--set", "overrides.max_steps=8", "--set", "methods.star.voco.block_sink=bos",
        "--set", "overrides.voco.positions=sequential",
    ]  # fmt: skip
    text = out_of(capsys, "study", "small.yaml", "--print-commands", *changes)
    assert "--seed 3" in text and "--max_steps 8" in text and "--seed 0" not in text
    star = text[text.index("# star-k1-s3") : text.index("--output_dir", text.index("# star-k1-s3"))]
    assert "--voco.block_sink bos" in star and "--voco.positions sequential" in star
    assert text.count("--voco.block_sink bos") == 1


def test_a_failed_run_gives_status_1_and_its_name(here: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("FAKE_FAIL", "star")
    assert main(["study", "small.yaml"]) == 1
    found = capsys.readouterr()
    errors = [line for line in found.err.splitlines() if line.startswith("voco study: error: ")]
    assert len(errors) == 2 and errors[0].startswith(
        "voco study: error: star-k1-s0 failed: voco train: error: it broke"
    )
    assert "(log: runs/study/trained/" in errors[0]
    assert "2 of 8 runs are not finished" in found.out
    tables = Path("runs/results/small/tables.md").read_text()
    assert "**Failed: star-k1-s0.**" in tables and "| VoCo" not in tables and "| voco | 1 |" in tables
    failed = json.loads(Path("runs/results/small/results.json").read_text())["failed"]
    assert [one["status"] for one in failed] == [3, 3] and "it was told to" in failed[0]["stderr"]


def test_tables_only_makes_them_again_from_what_is_there(here: Path, capsys: Any) -> None:
    out_of(capsys, "study", "small.yaml", "--only", "s0")
    made = Path("runs/results/small/tables.md")
    before = made.read_text()
    made.unlink()
    (here / "base" / "config.json").unlink()
    (here / "base").rmdir()
    text = out_of(capsys, "study", "small.yaml", "--tables-only")
    assert "4 of 8 runs are not finished" in text and made.read_text() == before
    assert len(journal(here)) == 3 + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a STUDY: a path, or one of ablations, "),
        (["gridworld_tabel1"], "no study 'gridworld_tabel1' (did you mean 'gridworld_table1'"),
        (["small.yaml", "--set", "seeds"], "--set 'seeds' is no change; write --set KEY=VALUE"),
        (["small.yaml", "--set", "sedes=[1]"], "study has no key 'sedes' (did you mean 'seeds'?)"),
        (["small.yaml", "--set", "recipe=gridworld_vco"], "no recipe 'gridworld_vco' (did you mean "),
        (["small.yaml", "--set", "overrides.max_step=3"], "unknown key 'max_step' (did you mean "),
        (["small.yaml", "--set", "methods.star.voco.rule=str"], "rule='str' is not known (did you mean "),
        (["small.yaml", "--set", "model=./gone"], "model ./gone does not exist"),
        (["small.yaml", "--set", "model=runs/gone"], "model runs/gone does not exist"),
        (["small.yaml", "--set", "eval_data=gone.json"], "eval_data.test gone.json does not exist"),
        (["small.yaml", "--set", "search={over: {lora_r: [1, 2]}, last: 9}"], "search.last=9 of 0 rows"),
        (["small.yaml", "--only", "vocco"], "of the 8 runs (did you mean 'voco-k1-s1'?): upper-k1-s0, "),
        (["small.yaml", "--only", "voco-k2*", "--list"], "matches none of the 8 runs"),
        (["small.yaml", "--only", "x9", "--print-commands"], "matches none of the 8 runs"),
        (["small.yaml", "--only", "voco", "--tables-only"], "leave one of them out"),
        (["small.yaml", "--jobs", "0"], "'0' is not a whole number of at least 1"),
        (["small.yaml", "--list", "--tables-only"], "not allowed with argument"),
    ],
)  # fmt: skip
def test_what_a_user_gets_wrong_is_one_line_and_status_2(
    here: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    assert message in error_of(capsys, "study", *arguments)
    assert journal(here) == [], "nothing was started"


# -- what `voco train` and `voco eval` do for it -------------------------------------------------------------


SHORT = [
    "--per_device_train_batch_size",
    "2",
    "--logging_steps",
    "1",
    "--disable_tqdm",
    "true",
    "--max_steps",
    "2",
]
DATA = ["--data", "runs/gridworld/test.json", "--image-folder", "runs/gridworld/images"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gridworld, the shipped base, and an upper bound and a star model trained for two steps."""
    place = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(place)
    try:
        made = ["gridworld", "runs/gridworld", "--num-train", "12", "--num-test", "6"]
        assert main([*made, "--base", "runs/gridworld_base"]) == 0
        common = ["train", "gridworld_voco", *SHORT, "--voco.num_tokens", "2"]
        causal = ["--voco.rule", "causal", "--save_at_steps", "1", "2", "--output_dir", "runs/upper"]
        assert main([*common, *causal]) == 0
        assert main([*common, "--voco.rule", "star", "--output_dir", "runs/star"]) == 0
    finally:
        os.chdir(before)
    return place


def test_training_writes_its_results_last_and_saves_at_the_steps_asked_for(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(world)
    found = json.loads(Path("runs/upper/train_results.json").read_text())
    assert found["steps"] == 2 and found["resumed_at"] == 0 and found["train_runtime"] > 0
    assert 0 < found["trained_parameters"] < found["parameters"] and found["environment"]["versions"]["torch"]
    assert sorted(p.name for p in Path("runs/upper").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not list(Path("runs/star").glob("checkpoint-*"))
    again = ["train", "gridworld_voco", *SHORT, "--voco.num_tokens", "2", "--voco.rule", "causal"]
    again += ["--output_dir", "runs/resumed", "--save_at_steps", "1"]
    os.system("mkdir -p runs/resumed && cp -r runs/upper/checkpoint-1 runs/resumed/")
    out_of(capsys, *again, "--resume_from_checkpoint", "true")
    assert json.loads(Path("runs/resumed/train_results.json").read_text())["resumed_at"] == 1
    assert "save_at_steps=[0] must be" in error_of(capsys, *again, "--save_at_steps", "[0]")


def test_eval_reads_checkpoints_of_steps_and_says_what_each_question_got(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(world)
    text = out_of(
        capsys, "eval", "runs/upper", *DATA, "--mode", "single", "--steps", "1,2", "--out", "s.json"
    )
    assert [line.split()[:2] for line in text.splitlines()[2:]] == [["single", "1"], ["single", "2"]]
    found = json.loads(Path("s.json").read_text())
    assert [entry["step"] for entry in found["scores"].values()] == [1, 2]
    last = found["scores"]["single at 2"]
    assert len(last["correct"]) == found["questions"] == len(found["types"]) == len(found["rows"]) == 48
    assert last["accuracy"] == pytest.approx(statistics.mean(map(int, last["correct"])))
    for kind, share in last["by_type"].items():
        right = [int(c) for c, t in zip(last["correct"], found["types"], strict=True) if t == kind]
        assert share == pytest.approx(statistics.mean(right))
    alone = json.loads(out_of(capsys, "eval", "runs/upper/checkpoint-2", *DATA, "--mode", "single", "--json"))
    assert alone["scores"]["single"]["accuracy"] == last["accuracy"]
    assert "correct" not in alone["scores"]["single"] and "types" not in alone
    message = error_of(capsys, "eval", "runs/upper", *DATA, "--steps", "7")
    assert "runs/upper has no checkpoint of step 7; it has 1, 2" in message


def test_eval_takes_rows_as_slices(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(world)
    base = ["eval", "runs/gridworld_base", *DATA, "--mode", "blind", "--out", "r.json"]
    counted = {}
    for rows in (":", "-2:", ":4", "2:3"):
        out_of(capsys, *base, f"--rows={rows}")
        found = json.loads(Path("r.json").read_text())
        counted[rows] = (found["images"], found["scores"]["blind"]["answers"])
    whole = counted[":"][1]
    assert [counted[rows][0] for rows in (":", "-2:", ":4", "2:3")] == [6, 2, 4, 1]
    assert (
        counted["-2:"][1] == whole[-16:]
        and counted[":4"][1] == whole[:32]
        and counted["2:3"][1] == whole[16:24]
    )
    assert "'3' is no range of rows" in error_of(capsys, *base, "--rows=3")
    assert "leaves none of the 6 rows" in error_of(capsys, *base, "--rows=6:")


def test_the_lower_bound_is_the_upper_bounds_checkpoint_under_the_mask(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Paper, Sec. 4.2: against `load` with the rule written out, question by question."""
    from voco_plugin.data.loaders import load_vision_dataset
    from voco_plugin.evaluation.metrics import evaluate, questions_of

    monkeypatch.chdir(world)
    out_of(capsys, "eval", "runs/upper", *DATA, "--mode", "lower", "--out", "l.json")
    found = json.loads(Path("l.json").read_text())["scores"]["lower"]
    config = vp.VoCoConfig(num_tokens=2, rule="isolated", positions="sequential")
    model, processor = vp.load("runs/upper", config, device="cpu")
    rows = load_vision_dataset("runs/gridworld/test.json", None, "runs/gridworld/images")
    expected = evaluate(model, processor, rows, questions_of(rows), mode="images")
    assert found["answers"] == expected.answers and found["num_tokens"] == 2
    assert found["cache"]["tokens"] == 2 and found["cache"]["vision_tokens"] == 16
    single = json.loads(out_of(capsys, "eval", "runs/upper", *DATA, "--mode", "single", "--json"))
    assert single["scores"]["single"]["cache"] is None
    message = error_of(capsys, "eval", "runs/star", *DATA, "--mode", "lower")
    assert "trained with VoCo tokens under rule 'star'" in message
    message = error_of(capsys, "eval", "runs/upper", *DATA, "--mode", "lower", "--mode", "single")
    assert "run `voco eval` once for each" in message


@pytest.mark.slow
def test_a_tiny_study_end_to_end(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The real commands, each a process: the record of a run is what the same commands give by hand."""
    monkeypatch.chdir(world)
    definition = {
        "recipe": "gridworld_voco", "model": "runs/gridworld_base", "data": "runs/gridworld/train.json",
        "image_folder": "runs/gridworld/images", "eval_data": "runs/gridworld/test.json", "curve": [1, 2],
        "curve_images": 3, "num_tokens": [2],
        "overrides": {"max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0},
        "search": {"over": {"learning_rate": [1e-3, 2e-3]}, "last": 2},
        "methods": {
            "upper": {"bound": "upper"}, "voco": {"eval_num_tokens": [2, 1]},
            "avg_pool": {"voco.compressor": "avg_pool", "tuned_as": "voco"}, "lower": {"bound": "lower"},
            "base": {"bound": "base"},
        },
    }  # fmt: skip
    Path("tiny.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    out_of(capsys, "study", "tiny.yaml", "--jobs", "2")
    result = json.loads(Path("runs/results/tiny/results.json").read_text())
    assert not result["missing"] and not result["failed"]
    made = json.loads(Path("runs/results/tiny/runs/voco-k2-s0.json").read_text())
    train, reading, curve = (shlex.split(line)[1:] for line in made["commands"])
    train[train.index("--output_dir") + 1] = "runs/by_hand"
    out_of(capsys, *train)
    reading[1], curve[1] = "runs/by_hand", "runs/by_hand"
    reading[-1], curve[-1] = "reading.json", "curve.json"
    out_of(capsys, *reading)
    out_of(capsys, *curve)
    found = json.loads(Path("reading.json").read_text())["scores"]
    assert [entry["correct"] for entry in made["scores"]] == [entry["correct"] for entry in found.values()]
    assert [entry["num_tokens"] for entry in made["scores"]] == [2, 1]
    found = json.loads(Path("curve.json").read_text())["scores"]
    assert [(e["step"], e["accuracy"]) for e in made["curve"]] == [
        (e["step"], e["accuracy"]) for e in found.values()
    ]
    rows = {row["method"]: row for row in result["rows"] if row["num_tokens"] != 1}
    assert rows["voco"]["cache_bytes"] == rows["avg_pool"]["cache_bytes"]
    assert rows["upper"]["cache_bytes"] == 8 * rows["voco"]["cache_bytes"], "16 vision tokens, 2 VoCo tokens"
    assert rows["avg_pool"]["trained_parameters"] > rows["voco"]["trained_parameters"]
    before = {path: path.stat().st_mtime_ns for path in Path("runs/study").rglob("*") if path.is_file()}
    out_of(capsys, "study", "tiny.yaml")
    assert {path: path.stat().st_mtime_ns for path in before} == before
