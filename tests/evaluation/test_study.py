"""A study computes each run once, resumes what was killed, notices what changed, and names what failed.

The children are `fake_voco.py`; `test_study_runs.py` runs the real commands.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paths import HELPERS, ROOT
from studies import SMALL, journal, planner, run
from voco_plugin.evaluation.study.definition import Study
from voco_plugin.evaluation.study.plan import as_words, units
from voco_plugin.evaluation.study.records import RunFolder, finished
from voco_plugin.evaluation.study.run_keys import fingerprint, training_key
from voco_plugin.evaluation.study.runner import choose, matches

ONE = {**SMALL, "seeds": [0], "num_tokens": [1]}


def names(folder: Path, results: str = "results") -> set[str]:
    return {path.stem for path in (folder / results / "runs").glob("*.json")}


# -- the grid ------------------------------------------------------------------------------------------------


def test_a_study_is_each_method_at_each_k_with_each_seed(here: Path) -> None:
    runs = planner(here).runs({})
    assert [run.name for run in runs] == [
        "upper-k1-s0", "upper-k1-s1", "voco-k1-s0", "voco-k1-s1", "voco-k2-s0", "voco-k2-s1",
        "lower-k1-s0", "lower-k1-s1", "lower-k2-s0", "lower-k2-s1", "base", "blind",
    ]  # fmt: skip
    by_name = {run.name: run for run in runs}
    upper, lower = by_name["upper-k1-s1"], by_name["lower-k2-s1"]
    assert "--voco.rule" in upper.training.words and "causal" in upper.training.words
    assert "--mode=single" in upper.readings[0].words
    # the lower bound trains nothing: it reads the upper bound's checkpoint of its seed, at its own K
    assert lower.training is None and lower.readings[0].training == upper.training
    assert {"--mode=lower", "--num-tokens=2", str(upper.training.folder)} <= set(lower.readings[0].words)
    assert by_name["base"].readings[0].words[:4] == ("eval", "base", "--data", "test.json")
    trainings = [training for training, _ in units(runs) if training is not None]
    assert len(trainings) == 2 + 4 and len(units(runs)) == 6 + 2


def test_every_run_is_computed_once_and_recorded(here: Path) -> None:
    run(here, planner(here), jobs=3)
    first = journal(here)
    assert sum(line.startswith("train") for line in first) == 6
    assert sum(line.startswith("eval") for line in first) == 2 + 4 + 4 + 2
    assert names(here) == {r.name for r in planner(here).runs({})}
    made = json.loads((here / "results" / "runs" / "voco-k2-s1.json").read_text())
    assert made["num_tokens"] == 2 and made["seed"] == 1 and made["training"]["trained_parameters"] == 1000
    assert made["commands"][0].startswith("voco train r --model_name_or_path base")
    assert len(made["scores"][0]["correct"]) == 40 and "answers" not in made["scores"][0]
    stamps = {p: p.stat().st_mtime_ns for p in (here / "results" / "runs").iterdir()}
    run(here, planner(here))
    assert journal(here) == first, "nothing is computed again"
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_studies_with_one_work_folder_share_what_is_the_same(here: Path) -> None:
    run(here, planner(here))
    before = len(journal(here))
    other = {"ours": {"voco.num_tokens": 1, "voco": {"rule": "isolated"}}, "star": {"voco.rule": "star"}}
    # "ours" says what voco says, in other words: the rule's default, and its K once more
    run(here, planner(here, methods=other, num_tokens=[1]), results="second")
    lines = journal(here)[before:]
    assert [line.split()[0] for line in lines] == ["train", "eval"] * 2, "star, with two seeds, and no more"
    assert names(here, "second") == {"ours-k1-s0", "ours-k1-s1", "star-k1-s0", "star-k1-s1"}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"overrides": {"max_steps": 6}}, "train"),
        ({"overrides": {"max_steps": 4, "weight_decay": 0.1}}, "train"),
        ({"overrides": {"max_steps": 4, "logging_steps": 3}}, None),
        ({"max_new_tokens": 9}, "eval"),
        ({"batch_size": 3}, None),
    ],
)  # fmt: skip
def test_a_changed_definition_is_computed_again(
    here: Path, change: dict[str, Any], again: str | None
) -> None:
    run(here, planner(here, ONE))
    before = journal(here)
    old = json.loads((here / "results" / "runs" / "voco-k1-s0.json").read_text())
    run(here, planner(here, ONE, **change))
    kinds = [line.split()[0] for line in journal(here)[len(before) :]]
    assert kinds.count("train") == (2 if again == "train" else 0)
    assert kinds.count("eval") == {"train": 3, "eval": 5, None: 0}[again]  # the base's stay, if trained anew
    new = json.loads((here / "results" / "runs" / "voco-k1-s0.json").read_text())
    assert (new["key"] == old["key"]) == (again is None), "the record is replaced"


@pytest.mark.parametrize("file", ["base/config.json", "train.json", "test.json"])
def test_a_changed_file_is_computed_again_and_a_moved_one_is_not(here: Path, file: str) -> None:
    run(here, planner(here, ONE))
    before = len(journal(here))
    os.rename(here / "base", here / "elsewhere")
    fingerprint.cache_clear()
    run(here, planner(here, ONE, model="elsewhere"))
    assert len(journal(here)) == before, "a folder keeps its key when it is moved"
    os.rename(here / "elsewhere", here / "base")
    (here / file).write_text('["changed"]')
    fingerprint.cache_clear()
    run(here, planner(here, ONE))
    kinds = [line.split()[0] for line in journal(here)[before:]]
    assert kinds.count("train") == (0 if file == "test.json" else 2) and "eval" in kinds


def test_keys_forget_where_files_go_and_see_what_a_path_holds(here: Path) -> None:
    values = {"learning_rate": 1e-3, "voco": {"num_tokens": 1}}
    key = training_key(values, fingerprint)
    for same in (
        {"output_dir": "x"},
        {"report_to": "wandb"},
        {"voco": {"rule": "isolated"}},
        {"lora_r": None},
    ):
        assert training_key(values | same, fingerprint) == key, same
    for other in ({"learning_rate": 2e-3}, {"voco": {"num_tokens": 2}}, {"voco": None}, {"seed": 0}):
        assert training_key(values | other, fingerprint) != key, other
    teacher = {"distill": {"teacher": "./base"}}
    before = training_key(values | teacher, fingerprint)
    (here / "base" / "config.json").write_text("[]")
    fingerprint.cache_clear()
    assert training_key(values | teacher, fingerprint) != before


# -- killed and failed ---------------------------------------------------------------------------------------


def wait_for(condition: Any, seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it never happened")


DRIVER = """
import signal, sys; sys.path.insert(0, {tests!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background is told to ignore it
from pathlib import Path
from studies import planner, run
from voco_plugin.evaluation.study.child_processes import terminated_as_interrupted
with terminated_as_interrupted():
    run(Path({folder!r}), planner(Path({folder!r})), jobs=2)
"""


def start(folder: Path, **environment: str) -> subprocess.Popen:
    """A study in a process of its own."""
    code = DRIVER.format(tests=str(HELPERS), folder=str(folder))
    path = os.pathsep.join([str(ROOT), str(HELPERS)])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env)


def hanging(folder: Path) -> list[int]:
    return [int(line.split()[1]) for line in journal(folder) if line.startswith("hangs")]


def test_a_killed_study_goes_on_from_checkpoints_and_repeats_nothing(here: Path) -> None:
    """SIGKILL on the study and its children, while the trainings with seed 1 hang."""
    study = start(here, FAKE_HANG="1")  # `--seed 1`, `--voco.num_tokens 1`
    wait_for(lambda: len(hanging(here)) == 2)
    study.send_signal(signal.SIGKILL)
    study.wait()
    for child in hanging(here):
        os.kill(child, signal.SIGKILL)
    before = journal(here)
    begun = {line.split()[1] for line in before if line.startswith("train")}
    run(here, planner(here))
    after = journal(here)[len(before) :]
    assert names(here) == {r.name for r in planner(here).runs({})}
    trained = {line.split()[1]: line.split()[3] for line in after if line.startswith("train")}
    assert len(trained) == 6 and {key for key, start in trained.items() if start == "2"} == begun
    # half the seconds of the training that went on from half its steps: scaled to a whole one
    upper = json.loads((here / "results" / "runs" / "upper-k1-s0.json").read_text())["training"]
    assert upper["resumed_at"] == 2 and upper["train_runtime"] == 4.0


def test_a_restarted_study_waits_for_children_that_outlived_the_first(here: Path) -> None:
    study = start(here, FAKE_HANG="1", FAKE_GO=str(here / "go"))
    wait_for(lambda: len(hanging(here)) == 2)
    study.send_signal(signal.SIGKILL)
    study.wait()
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if "waiting" in line:
            (here / "go").touch()  # the orphans finish

    run(here, planner(here), tell=tell)
    starts = [line.split()[1] for line in journal(here) if line.startswith("train")]
    assert len(starts) == len(set(starts)) == 6, "no training was started a second time"
    assert any("another process is at it; waiting" in line for line in told)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_ends_its_children(here: Path, number: int) -> None:
    study = start(here, FAKE_HANG="1")
    wait_for(lambda: len(hanging(here)) == 2)
    study.send_signal(number)
    assert study.wait(timeout=20) != 0
    wait_for(lambda: not any(map(alive, hanging(here))))
    assert not names(here), "and starts no other"


def test_a_failed_run_is_named_and_does_not_stop_the_others(here: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FAKE_FAIL", "causal")  # the upper bound's trainings
    told: list[str] = []
    made = run(here, planner(here), jobs=2, tell=told.append)
    assert names(here) == {f"voco-k{k}-s{s}" for k in (1, 2) for s in (0, 1)} | {"base", "blind"}
    failed = {name for failure in made.failures for name in failure.runs}
    assert failed == {f"upper-k1-s{s}" for s in (0, 1)} | {f"lower-k{k}-s{s}" for k in (1, 2) for s in (0, 1)}
    one = made.failures[0]
    assert (
        one.status == 3
        and "it broke, as it was told to" in one.stderr
        and "--voco.rule causal" in one.command
    )
    assert "it broke" in Path(one.log).read_text()
    assert any("FAILED upper-k1-s0" in line for line in told)
    monkeypatch.delenv("FAKE_FAIL")
    before = len(journal(here))
    assert run(here, planner(here)).failures == []
    kinds = [line.split()[0] for line in journal(here)[before:]]
    assert kinds.count("train") == 2 and kinds.count("eval") == 6, "what failed is tried again, and no more"


def test_a_failed_reading_costs_its_run_alone(here: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FAKE_FAIL", "--num-tokens=2")
    made = run(here, planner(here))
    assert {name for failure in made.failures for name in failure.runs} == {"lower-k2-s0", "lower-k2-s1"}
    assert len(names(here)) == 10


def test_a_reading_of_unfinished_training_is_no_finished_run(here: Path) -> None:
    plan = planner(here)
    one = next(r for r in plan.runs({}) if r.name == "voco-k1-s0")
    one.training.folder.mkdir(parents=True)
    assert not finished(one)
    run(here, plan, only="voco-k1-s0")
    assert finished(one) and names(here) == {"voco-k1-s0"}
    assert not (one.training.folder / "checkpoint-2" / "optimizer.pt").exists(), "it will not go on"


# -- the search ----------------------------------------------------------------------------------------------

SEARCHED = {**SMALL, "search": {"over": {"learning_rate": [1e-3, 2e-3]}, "last": 10}}


def test_the_search_holds_rows_out_of_every_run_and_uses_its_choice_for_all(here: Path) -> None:
    plan = planner(here, SEARCHED)
    candidates = plan.candidates()
    assert [c.method.name for c in candidates] == ["upper"] * 2 + ["voco"] * 2
    assert all(
        "--rows=-10:" in c.readings[0].words and "train.json" in c.readings[0].words for c in candidates
    )
    found: list[Any] = []
    run(here, plan, found=found.extend)
    chosen, tried = choose(candidates)
    assert tried == found
    for method in ("upper", "voco"):
        mine = [one for one in tried if one["method"] == method]
        best = max(mine, key=lambda one: one["accuracy"])
        assert chosen[method] == best["tried"] and [one["chosen"] for one in mine].count(True) == 1
    for made in plan.runs(chosen):
        if made.training is not None:
            words = made.training.words
            assert words[words.index("--max_train_samples") + 1] == "90"
            rate = words[words.index("--learning_rate") + 1]
            assert rate == as_words(chosen[made.method.name])[1]
    lower = next(r for r in plan.runs(chosen) if r.name == "lower-k2-s1")
    assert lower.tried == chosen["upper"]
    # the chosen candidate is the run of seed 0: 4 candidates, and 6 runs less 2
    assert sum(line.startswith("train") for line in journal(here)) == 4 + 6 - 2


def test_a_method_may_take_the_values_of_another_search(here: Path) -> None:
    methods = {**SMALL["methods"], "star": {"voco.rule": "star", "tuned_as": "voco"}}
    plan = planner(here, SEARCHED, methods=methods)
    assert {c.method.name for c in plan.candidates()} == {"upper", "voco"}
    run(here, plan, only="star-k1-s0")
    chosen, _ = choose(plan.candidates())
    assert set(chosen) == {"voco"}, "the search that star depends on, and no other"
    assert names(here) == {"star-k1-s0"}
    star = next(r for r in plan.runs(chosen) if r.name == "star-k1-s0")
    assert star.tried == chosen["voco"]


def test_a_part_of_a_study_keeps_what_the_search_chose_for_the_others(here: Path) -> None:
    plan = planner(here, SEARCHED)
    whole = run(here, plan).run()
    found: list[Any] = []
    part = run(here, plan, only="voco-k1-s0", found=found.extend)
    assert {one["method"] for one in found} == {"upper", "voco"} and all(one["accuracy"] for one in found)
    assert [r.key for r in part.run()] == [r.key for r in whole]


def test_a_search_that_failed_is_named_with_the_runs_that_wait_for_it(here: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FAKE_FAIL", "causal")
    made = run(here, planner(here, SEARCHED))
    assert {"voco-k1-s0", "base"} <= names(here) and not {"upper-k1-s0", "lower-k1-s0"} & names(here)
    last = made.failures[-1]
    assert set(last.runs) == {"upper-k1-s0", "upper-k1-s1"} | {
        f"lower-k{k}-s{s}" for k in (1, 2) for s in (0, 1)
    }
    assert last.stderr == "the search of upper is not complete"


# -- curves, several K, progress -----------------------------------------------------------------------------


def test_a_curve_saves_its_steps_and_reads_them_in_one_go(here: Path) -> None:
    run(here, planner(here, curve=[4, 2], curve_images=20), only="voco-k1-s0")
    made = json.loads((here / "results" / "runs" / "voco-k1-s0.json").read_text())
    assert [entry["step"] for entry in made["curve"]] == [2, 4] and len(made["scores"]) == 1
    assert (
        "--save_at_steps '[2, 4]'" in made["commands"][0] and "--steps=2,4 --limit=20" in made["commands"][2]
    )
    with pytest.raises(ValueError, match="step 9 is beyond max_steps=4 of method upper"):
        planner(here, curve=[2, 9]).runs({})
    with pytest.raises(ValueError, match="save_total_limit=1 deletes some"):
        planner(here, curve=[2], overrides={"max_steps": 4, "save_total_limit": 1}).runs({})


def test_one_training_is_read_at_several_k(here: Path) -> None:
    methods = {"fixed": {"num_tokens": [8], "eval_num_tokens": [8, 4, 1]}}
    run(here, planner(here, methods=methods, seeds=[0]))
    made = json.loads((here / "results" / "runs" / "fixed-k8-s0.json").read_text())
    assert [entry["num_tokens"] for entry in made["scores"]] == [8, 4, 1]
    assert sum(line.startswith("train") for line in journal(here)) == 1


def test_progress_counts_the_whole_grid_and_ends_at_all_of_it(here: Path) -> None:
    told: list[str] = []
    run(here, planner(here), tell=told.append)
    counted = [line for line in told if line.startswith("[")]
    assert counted[0].startswith("[1/18]") and counted[-1].startswith("[18/18]")
    assert "left" in counted[3] and "left" not in counted[-1]
    told.clear()
    run(here, planner(here, seeds=[0, 1, 2]), tell=told.append)
    assert next(line for line in told if line.startswith("[")).startswith("[19/26]"), "what is done counts"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(None, True), ("voco", True), ("voco-k*-s0", True), ("voco-k*", True), ("star", False), ("k1-s", True),
     ("voco-k2*", False), ("oco-k1-s0*", False)],
)  # fmt: skip
def test_only_takes_a_part_of_a_name_or_a_pattern_for_all_of_it(pattern: str | None, expected: bool) -> None:
    assert matches("voco-k1-s0", pattern) == expected


def test_a_record_that_is_no_json_is_an_error_that_says_so(here: Path) -> None:
    plan = planner(here)
    one = plan.runs({})[0]
    folder = RunFolder(here / "results")
    folder.path(one).parent.mkdir(parents=True)
    folder.path(one).write_text("{")
    with pytest.raises(ValueError, match="upper-k1-s0.json is not JSON .*remove it"):
        folder.read(one)


# -- the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "study has no key 'seed' (did you mean 'seeds'?)"),
        ({"recipe": None}, "study has no recipe: add it"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [0, 0]}, "names a number twice"),
        ({"seeds": [-1]}, "seeds=-1 must be a whole number of at least 0"),
        ({"num_tokens": [0]}, "num_tokens=0 must be a whole number of at least 1"),
        ({"num_tokens": "two"}, "num_tokens='two' must be"),
        ({"curve": [1.5]}, "curve=1.5 must be"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"a": {"bound": "uper"}}}, "methods.a: bound='uper' is not known (did you mean 'upper'"),
        ({"methods": {"a": {"mode": "vocoo"}}}, "methods.a: mode='vocoo' is not known (did you mean 'voco'"),
        ({"methods": {"a": 3}}, "methods.a=3 must be a section"),
        ({"methods": {"a": {"bound": "lower"}}}, "no method is bound: upper"),
        ({"methods": {"a": {"bound": "upper"}, "b": {"bound": "upper"}}}, "a and b are both bound: upper"),
        ({"methods": {"a": {"bound": "base", "voco.rule": "star"}}}, "trains nothing, so it takes no"),
        ({"methods": {"a": {"bound": "blind", "seeds": [1]}}}, "it has neither num_tokens nor seeds"),
        ({"methods": {"a": {"bound": "upper", "mode": "voco"}}}, "leave mode='voco' out"),
        ({"methods": {"a": {"tuned_as": "b"}, "bb": None}}, "is no method with a search of its own (did "
         "you mean 'bb'?)"),
        ({"reference": "voc"}, "reference='voc' is not known (did you mean 'voco'?)"),
        ({"resample": "rows"}, "resample='rows' is not known"),
        ({"eval_data": {"a": {"dta": "x"}}}, "eval_data.a has no key 'dta' (did you mean 'data'?)"),
        ({"eval_data": {"a": {}}}, "eval_data.a has no data: add it"),
        ({"eval_data": 3}, "eval_data=3 must be a set"),
        ({"search": {"over": {"lr": [1, 2]}}}, "search: give one of last"),
        ({"search": {"over": {"lr": [1]}, "last": 3}}, "over.lr=[1] must be a list of at least two"),
        ({"search": {"over": {"lr": [1, 2]}, "last": 3, "sead": 1}}, "did you mean 'seed'"),
        ({"overrides": 3}, "overrides=3 must be a section"),
    ],
)  # fmt: skip
def test_a_wrong_definition_is_an_error_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as problem:
        Study.from_dict({**SMALL, **change})
    assert message in str(problem.value)


def test_sections_and_dotted_keys_say_the_same() -> None:
    study = Study.from_dict(
        {**SMALL, "methods": {"a": {"voco": {"rule": "star"}, "lora_r": 4}, "b": {"voco.rule": "star"}}}
    )
    assert study.methods["a"].overrides == {"voco.rule": "star", "lora_r": 4}
    assert study.methods["b"].overrides == {"voco.rule": "star"}
    assert as_words({"a": [1, 2], "b": None, "c": True, "d": 1e-3, "e": "x y"}) == [
        "--a", "[1, 2]", "--b", "null", "--c", "true", "--d", "0.001", "--e", "x y",
    ]  # fmt: skip
