"""``voco eval SUITE``: what is typed, and what it says before anything runs. Runs: test_lmms_eval.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from voco_plugin.cli import main
from voco_plugin.cli.accelerate_launch import load_integration

SUITE = ["eval", "paper-image"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model's folder and one set of data; the harness counts as installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "data" / "POPE").mkdir(parents=True)
    (tmp_path / "data" / "POPE" / "test.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(load_integration("lmms_eval.harness"), "check_installed", lambda: "0.7.3")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["eval", "paper-imag", "m", "--data-root", "data"], "is no suite (did you mean 'paper-image'?)"),
        (["eval", "paper-image"], "needs a model: voco eval paper-image MODEL --data-root DIR"),
        (["eval", "m"], "give a data set for m: --data SET"),
        ([*SUITE, "m"], "needs --data-root DIR"),
        ([*SUITE, "./nowhere", "--data-root", "data"], "./nowhere"),
        ([*SUITE, "m", "--data-root", "nowhere"], "--data-root nowhere is no folder"),
        ([*SUITE, "m", "--data-root", "data"], "testdev_balanced_images/testdev-*.parquet in"),
        ([*SUITE, "m", "--data-root", "data", "--only", "poe"], "paper-image (did you mean 'pope'?)"),
        ([*SUITE, "m", "--data-root", "data", "--data", "x"], "--data goes with --data SET, not with"),
        ([*SUITE, "m", "--data-root", "data", "--turns"], "--turns goes with --data SET"),
        ([*SUITE, "m", "--data-root", "data", "--frames", "single"], "--frames goes with --data SET"),
        ([*SUITE, "m", "--data-root", "data", "--num-tokens", "1,2"], "a suite takes one --num-tokens K"),
        ([*SUITE, "m", "--data-root", "data", "--on-bad-sample", "skip"], "a suite asks every question"),
        ([*SUITE, "m", "--data-root", "data", "--judge", "http://x/v1", "--judge-model", "j"],
         "--judge goes with paper-video"),
        ([*SUITE, "m", "--data-root", "data", "--mode", "base", "--upper", "m"], "two bounds of one kind"),
        ([*SUITE, "m", "--data-root", "data", "--out", "m/config.json"], "is a file; a suite writes a"),
        (["eval", "m", "--data", "x.json", "--upper", "m"], "--upper goes with a suite"),
        (["eval", "m", "--data", "x.json", "--data-root", "data"], "--data-root goes with a suite"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder: Path, capsys, argv: list[str], said: str) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_without_the_harness_the_error_says_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    from importlib.metadata import PackageNotFoundError

    harness = load_integration("lmms_eval.harness")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", missing)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}", encoding="utf-8")
    assert main([*SUITE, "m", "--data-root", str(tmp_path)]) == 2
    assert "pip install 'voco_plugin[eval]'" in capsys.readouterr().err


def test_bounds_that_are_none_are_refused(folder: Path, capsys) -> None:
    from voco_plugin import VoCoConfig

    VoCoConfig(rule="isolated").save(folder / "m")
    assert main([*SUITE, "m", "--data-root", "data", "--only", "pope", "--upper", "m"]) == 2
    assert "--upper m is trained under rule 'isolated'" in capsys.readouterr().err
    assert main([*SUITE, "m", "--data-root", "data", "--only", "pope", "--lower", "m"]) == 2
    assert "is trained with VoCo tokens under rule 'isolated'" in capsys.readouterr().err


def test_prepare_lays_the_data_out_and_prints_the_harnesss_command(folder: Path, capsys) -> None:
    argv = [*SUITE, "m", "--data-root", "data", "--only", "POPE", "--prepare", "--out", "a, b"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    work = folder / "a, b" / "data"
    assert said.startswith(f"cd '{work}' && HF_HUB_OFFLINE=1 python -m lmms_eval --model voco ")
    assert f"pretrained={folder / 'm'} " in said and "--tasks pope " in said
    assert (work / "lmms-lab-encoder" / "POPE" / "README.md").is_file()


def test_a_folder_that_is_called_like_a_suite_is_still_a_model(folder: Path, capsys) -> None:
    assert main(["eval", "gridworld", "--data", "nowhere.json"]) == 2
    assert "nowhere.json" in capsys.readouterr().err


class Harness:
    """What stands in for the harness: one question an image, answered by the row's name."""

    def __init__(self, right: dict[str, list[int]]) -> None:
        self.right, self.runs = right, []

    def run(self, reader: Any, task: str, metric: str, work: Path, **options: Any) -> dict[str, Any]:
        assert Path(work).is_absolute() and any(Path(work).iterdir())
        self.runs.append((reader.name, task, options["limit"]))
        samples = [
            {
                "doc_id": n,
                "images": [f"i{n}"],
                metric: {"ground_truth": "yes", "prediction": "yes" if hit else "no", "score": hit},
                "doc": {"question": f"what is {n}", "answer": "dog"},
                "filtered_resps": ["a dog"],
            }
            for n, hit in enumerate(self.right[reader.name])
        ]
        return {"task": task, "metric": metric, "score": None, "samples": samples}


class FakeReader:
    fingerprint, asked, compressed = {"model": "x"}, 0, 0

    def __init__(self, args: Any) -> None:
        self.name, self.args = args.mode, args
        self.num_tokens = self.tokens = 2 if args.mode != "base" else None

    def close(self) -> None: ...


@pytest.fixture
def harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    made = Harness({"base": [1, 1, 1, 1], "voco": [1, 1, 1, 0], "lower": [1, 0, 0, 0]})
    monkeypatch.setattr(load_integration("lmms_eval.loading"), "load_reader", FakeReader)
    monkeypatch.setattr(load_integration("lmms_eval.harness"), "run_task", made.run)
    return made


def test_rows_are_run_once_and_set_against_the_bounds(folder: Path, harness: Harness, capsys) -> None:
    argv = [*SUITE, "m", "--data-root", "data", "--only", "pope", "--mode", "voco", "--mode", "lower",
            "--mode", "base", "--limit", "4", "--json", "--out", "out"]  # fmt: skip
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["rows"]] == ["base", "voco", "lower"]
    upper, voco, lower = (100 * 2 * n / (2 * n + 4 - n) for n in (4, 3, 1))
    cell = report["rows"][1]["cells"]["POPE"]
    assert cell["score"] == pytest.approx(voco) and cell["ratio"] == pytest.approx(voco)
    assert cell["retention"] == pytest.approx(100 * (voco - lower) / (upper - lower))
    assert len(harness.runs) == 3
    assert main(argv) == 0 and len(harness.runs) == 3  # all of it is there
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == report["rows"]
    assert main([*argv[:-3], "--limit", "2", "--out", "out"]) == 0 and len(harness.runs) == 6
    capsys.readouterr()
    os.utime(folder / "data" / "POPE" / "test.parquet", (1, 1))  # other data
    assert main(argv) == 0 and len(harness.runs) == 9


def test_a_half_written_result_is_run_again(folder: Path, harness: Harness, capsys) -> None:
    argv = [*SUITE, "m", "--data-root", "data", "--only", "pope", "--out", "out"]
    assert main(argv) == 0
    (folder / "out" / "voco" / "pope.json").write_text('{"key": "x', encoding="utf-8")
    assert main(argv) == 0 and len(harness.runs) == 2
    assert "| *VoCo-LLaMA (paper)* | 1 | 81.4 |" in capsys.readouterr().out


def test_a_judge_reads_the_answers_beside_the_match(
    folder: Path, harness: Harness, monkeypatch, capsys
) -> None:
    from voco_plugin.cli import eval_video

    home = folder / "data" / "MSVD-QA"
    (home / "videos").mkdir(parents=True)
    (home / "videos" / "vid1.mp4").write_bytes(b"x")
    record = [{"id": 0, "video_id": 1, "question": "what", "answer": "dog"}]
    (home / "test_qa.json").write_text(json.dumps(record), encoding="utf-8")
    read = []

    def judged(judge: Any, questions: Any, answers: list[str], name: str, quiet: bool) -> dict[str, Any]:
        read.append((questions[0].text, questions[0].answer, answers[0], name))
        return {"accuracy": 0.5, "score": 2.5, "judged": len(answers)}

    monkeypatch.setattr(eval_video, "judged", judged)
    argv = ["eval", "paper-video", "m", "--data-root", "data", "--only", "MSVD-QA", "--out", "out",
            "--judge", "http://localhost/v1", "--judge-model", "j"]  # fmt: skip
    assert main(argv) == 0
    assert read == [("what is 0", "dog", "a dog", "voco, MSVD-QA")]
    said = capsys.readouterr().out
    assert "| voco | MSVD-QA | 50.0 | 2.5 | 4 |" in said and "compare with --judge only" in said
    assert main([*argv[:-4], "--judge", "ftp://x", "--judge-model", "j"]) == 2  # before anything runs
    assert "judge url 'ftp://x' is none" in capsys.readouterr().err and len(harness.runs) == 1
