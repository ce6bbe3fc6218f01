"""The real lmms-eval with the model ``voco``: its own command on data in the published schema.

    make test-eval        an environment of its own (.venv-eval), and these tests there

Each run is a process of a quarter of a minute: what one gives is looked at by many tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-eval")

from eval_sets import QUESTIONS, answering_vlm, write_sets  # noqa: E402
from paths import ROOT  # noqa: E402
from voco_plugin.cli import main  # noqa: E402

TASKS = ("voco_gridworld", "pope", "gqa", "mme", "scienceqa_img", "textvqa_val", "refcoco_bbox_rec_val")
OWN_TASKS = ROOT / "integrations" / "lmms_eval" / "tasks"
IMAGES = {"pope": 5, "gqa": 5, "mme": 8, "scienceqa_img": 4, "textvqa_val": 4, "refcoco_bbox_rec_val": 12}
"""Pictures of each set; those of gridworld are counted from its file."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the sets, a gridworld, and ``work``, laid out by ``--prepare`` for the harness's command."""
    folder = tmp_path_factory.mktemp("lmms eval")  # with a space
    answering_vlm(folder / "vlm")
    write_sets(folder / "sets" / "lmms-lab-encoder")
    assert main(["gridworld", str(folder / "sets" / "grid"), "--num-train", "2", "--num-test", "3"]) == 0
    before = os.getcwd()
    os.chdir(folder)  # relative paths
    try:
        for suite, root in (("paper-image", "sets"), ("paper-fine", "sets"), ("gridworld", "sets/grid")):
            only = ["--only", "TextVQA,RefCOCO val"] if suite == "paper-fine" else []
            assert main(["eval", suite, "vlm", "--data-root", root, "--prepare", "--out", "work", *only]) == 0
    finally:
        os.chdir(before)
    return folder


def harness(place: Path, name: str, model_args: str, *more: str, tasks: str = ",".join(TASKS)) -> Any:
    """Run the harness's own command; per task the logged questions, and its results."""
    out = place / name
    command = [sys.executable, "-m", "lmms_eval", "--model", "voco", "--tasks", tasks,
               "--model_args", f"pretrained={place / 'vlm'},max_new_tokens=16{model_args}",
               "--include_path", str(OWN_TASKS), "--output_path", str(out), "--log_samples",
               *more]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=place / "work" / "data", env=env, capture_output=True, text=True)
    results = sorted(out.rglob("*_results.json"))
    assert run.returncode == 0 and results, run.stdout[-3000:] + run.stderr[-3000:]
    samples = {}
    for task in tasks.split(","):
        (file,) = out.rglob(f"*_samples_{task}.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return samples, json.loads(results[-1].read_text(encoding="utf-8"))["results"], run.stdout + run.stderr


@pytest.fixture(scope="module")
def cached(place: Path) -> Any:
    return harness(place, "cached", f',store="{place / "a,store"}"', "--batch_size", "32")


def answers(samples: Any) -> dict[str, list[str]]:
    """Per task the answers in the order of its questions; the harness unpacks a list of one."""
    return {
        task: [one["filtered_resps"] for one in sorted(listed, key=lambda one: one["doc_id"])]
        for task, listed in samples.items()
    }


def test_every_task_runs_and_its_answers_differ(cached: Any) -> None:
    for task, said in answers(cached[0]).items():
        assert len(set(said)) > 1 or task == "voco_gridworld", (task, Counter(said))


@pytest.mark.parametrize(
    ("name", "model_args", "batch"),
    [("one_by_one", "", "1"), ("uncached", ",mode=single", "8"), ("again", ',store="{store}"', "5")],
)
def test_cached_uncached_and_batched_answers_are_equal(
    place: Path, cached: Any, name: str, model_args: str, batch: str
) -> None:
    found = harness(place, name, model_args.format(store=place / "a,store"), "--batch_size", batch)
    assert answers(found[0]) == answers(cached[0])
    made = int(re.search(r"(\d+) image\(s\) compressed", found[2])[1])
    assert made == (images_of(place) if name == "one_by_one" else 0)


def images_of(place: Path) -> int:
    lines = (place / "work/data/voco_sets/gridworld.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(IMAGES.values()) + len({json.loads(line)["images"][0] for line in lines})


def test_one_compression_an_image_whatever_the_number_of_questions(place: Path, cached: Any) -> None:
    made, asked = (
        int(number) for number in re.search(r"(\d+) image\(s\) compressed for (\d+)", cached[2]).groups()
    )
    assert made == images_of(place)
    assert asked == sum(map(len, cached[0].values())) > 4 * made // 2


# -- counted by hand, from the answers and the Parquet files alone


def rows(place: Path, path: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(place / "sets" / "lmms-lab-encoder" / path).to_pylist()


def test_popes_figures_by_hand(place: Path, cached: Any) -> None:
    truth = [row["answer"] for row in rows(place, "POPE/data/test-00000-of-00001.parquet")]
    said = answers(cached[0])["pope"]
    pairs = Counter(zip(truth, said, strict=True))
    hit, missed, false = pairs["yes", "yes"], pairs["yes", "no"], pairs["no", "yes"]
    found = cached[1]["pope"]
    assert found["pope_accuracy,none"] == pytest.approx((hit + pairs["no", "no"]) / 30)
    precision, recall = hit / (hit + false), hit / (hit + missed)
    assert found["pope_f1_score,none"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert 0 < hit < 30


def test_gqas_figure_by_hand(place: Path, cached: Any) -> None:
    asked = rows(place, "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet")
    said = answers(cached[0])["gqa"]
    right = [a == row["answer"] for a, row in zip(said, asked, strict=True)]
    assert cached[1]["gqa"]["exact_match,none"] == pytest.approx(sum(right) / 30) and 0 < sum(right) < 30


def test_scienceqas_figure_by_hand(place: Path, cached: Any) -> None:
    asked = rows(place, "ScienceQA/ScienceQA-IMG/test-00000-of-00001.parquet")
    said = answers(cached[0])["scienceqa_img"]
    right = [a == "AB"[row["answer"]] for a, row in zip(said, asked, strict=True)]
    assert cached[1]["scienceqa_img"]["exact_match,none"] == pytest.approx(sum(right) / 24) and any(right)


def test_textvqas_figure_by_hand(place: Path, cached: Any) -> None:
    """Each of ten people in turn is left out: a third of the others, at most 1."""
    asked = rows(place, "textvqa/data/validation-00000-of-00001.parquet")
    scores = []
    for said, row in zip(answers(cached[0])["textvqa_val"], asked, strict=True):
        given = [answer.lower().strip(".") for answer in row["answers"]]
        others = [given[:n] + given[n + 1 :] for n in range(10)]
        scores.append(sum(min(1, other.count(said) / 3) for other in others) / 10)
    assert cached[1]["textvqa_val"]["exact_match,none"] == pytest.approx(sum(scores) / 24)
    assert 0 < sum(scores) < 24


def test_mmes_points_by_hand(place: Path, cached: Any) -> None:
    asked = rows(place, "MME/data/test-00000-of-00001.parquet")
    right = [a == row["answer"].lower() for a, row in zip(answers(cached[0])["mme"], asked, strict=True)]
    points: dict[str, list[float]] = {}
    for n in range(0, len(asked), 2):
        both = right[n] + right[n + 1]
        points.setdefault(asked[n]["category"], []).append(50 * both + 100 * (both == 2))
    total = sum(sum(p) / len(p) for name, p in points.items() if name != "code_reasoning")
    assert cached[1]["mme"]["mme_perception_score,none"] == pytest.approx(total) and total > 0


def test_refcocos_figure_by_hand(place: Path, cached: Any) -> None:
    hits = []
    listed = iter(answers(cached[0])["refcoco_bbox_rec_val"])
    for row in rows(place, "RefCOCO/data/val-00000-of-00001.parquet"):
        from io import BytesIO

        from PIL import Image

        width, height = Image.open(BytesIO(row["image"]["bytes"])).size
        x, y, w, h = row["bbox"]
        a = [x / width, y / height, (x + w) / width, (y + h) / height]
        for _ in row["answer"]:
            said = next(listed)
            b = json.loads(said) if said.startswith("[") else [0, 0, 0, 0]
            cut = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - cut
            hits.append(cut / both >= 0.5)
    found = cached[1]["refcoco_bbox_rec_val"]["refcoco_ACC@0.5,none"]
    assert found == pytest.approx(sum(hits) / 24) and 0 < sum(hits) < 24


# -- voco eval SUITE


@pytest.fixture(scope="module")
def suites(place: Path) -> dict[str, Any]:
    """What ``voco eval`` writes for the same model and data, run from another folder."""
    elsewhere = place / "else where, too"
    elsewhere.mkdir()
    before = os.getcwd()
    os.chdir(elsewhere)
    out = {}
    try:
        for suite, root, more in (
            ("paper-image", "../sets", ["--mode", "voco", "--mode", "base"]),
            ("paper-fine", "../sets", ["--only", "RefCOCO val,textvqa"]),
            ("gridworld", "../sets/grid", []),
        ):
            argv = ["eval", suite, "../vlm", "--data-root", root, "--batch-size", "8", "--out", suite,
                    "--max-new-tokens", "16", *more]  # fmt: skip
            assert main(argv) == 0
            assert os.getcwd() == str(elsewhere.resolve())
            out[suite] = json.loads((elsewhere / suite / "table.json").read_text(encoding="utf-8"))
    finally:
        os.chdir(before)
    return out


def cell(suites: dict[str, Any], suite: str, name: str, row: str = "voco") -> dict[str, Any]:
    return next(r for r in suites[suite]["rows"] if r["name"] == row)["cells"][name]


@pytest.mark.parametrize(
    ("suite", "name", "task", "metric", "scale"),
    [
        ("paper-image", "GQA", "gqa", "exact_match", 100),
        ("paper-image", "POPE", "pope", "pope_f1_score", 100),
        ("paper-image", "MME", "mme", "mme_perception_score", 1),
        ("paper-image", "SQA-I", "scienceqa_img", "exact_match", 100),
        ("paper-fine", "TextVQA", "textvqa_val", "exact_match", 100),
        ("paper-fine", "RefCOCO val", "refcoco_bbox_rec_val", "refcoco_ACC@0.5", 100),
        ("gridworld", "gridworld", "voco_gridworld", "exact_match", 100),
    ],
)
def test_the_commands_scores_are_the_harnesss(
    suites: dict[str, Any], cached: Any, suite: str, name: str, task: str, metric: str, scale: float
) -> None:
    assert cell(suites, suite, name)["score"] == pytest.approx(
        scale * cached[1][task][f"{metric},none"], abs=1e-6
    )


def test_every_count_of_ours_is_the_harnesss_own_in_the_same_run(suites: dict[str, Any]) -> None:
    for report in suites.values():
        assert not [note for note in report["notes"] if "the harness itself says" in note]
        for row in report["rows"]:
            for found in row["cells"].values():
                assert found["harness"] == pytest.approx(found["score"], abs=1e-4)


def test_each_set_was_compressed_once_an_image(suites: dict[str, Any]) -> None:
    counted = suites["paper-image"]["runs"]["voco"]
    assert {name: one["compressed"] for name, one in counted.items()} == {
        "GQA": 5, "MMB": 3, "MME": 8, "POPE": 5, "SEED": 3, "SQA-I": 4, "VQA-v2": 3
    }  # fmt: skip
    assert counted["GQA"]["asked"] == 5 * QUESTIONS
    assert all(one["compressed"] == 0 for one in suites["paper-image"]["runs"]["base"].values())


def test_the_report_is_there_as_text_json_and_picture(suites: dict[str, Any], place: Path) -> None:
    folder = place / "else where, too" / "paper-image"
    assert "## Raw ratio" in (folder / "table.md").read_text(encoding="utf-8")
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    assert {r["name"] for r in suites["paper-image"]["published"]} >= {
        "VoCo-LLaMA (paper)",
        "HTC-VLM (its paper)",
    }


def test_an_interrupted_run_goes_on_without_asking_twice(place: Path, monkeypatch, capsys) -> None:
    from voco_plugin.cli import output

    out = place / "stopped"
    argv = ["eval", "paper-image", str(place / "vlm"), "--data-root", str(place / "sets"), "--out", str(out),
            "--only", "pope,scienceqa_img", "--batch-size", "4", "--max-new-tokens", "16",
            "--json"]  # fmt: skip

    class Stops:
        """A bar that interrupts after 12 questions, in the first benchmark."""

        seen = 0

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None: ...

        def set_description(self, text: str) -> None: ...

        def update(self, count: int) -> None:
            Stops.seen += count
            if Stops.seen == 12:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output, "progress", lambda *a, **k: Stops())
        assert main(argv) == 130
    capsys.readouterr()
    assert main(argv) == 0
    first = json.loads(capsys.readouterr().out)
    assert {name: one["asked"] for name, one in first["runs"]["voco"].items()} == {
        "POPE": 30 - 12,
        "SQA-I": 24,
    }
    assert main(argv) == 0  # all of it is there
    assert "taken from" in (found := capsys.readouterr()).err
    assert json.loads(found.out)["rows"] == first["rows"]


def test_a_limit_keeps_mmes_pairs_whole(place: Path, capsys) -> None:
    argv = ["eval", "paper-image", str(place / "vlm"), "--data-root", str(place / "sets"), "--only", "MME",
            "--limit", "3", "--out", str(place / "limited"), "--max-new-tokens", "16", "--json"]  # fmt: skip
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"][0]["cells"]["MME"]["questions"] == 4
    assert "the first 3 questions" in report["notes"][0]


def test_data_of_another_schema_is_one_line(place: Path, tmp_path: Path, capsys) -> None:
    import datasets

    home = tmp_path / "POPE"
    source = place / "sets" / "lmms-lab-encoder" / "POPE" / "data" / "test-00000-of-00001.parquet"
    table = datasets.Dataset.from_parquet(str(source), cache_dir=str(tmp_path / "cache"))
    home.mkdir()
    table.rename_column("answer", "label").to_parquet(str(home / "test-0.parquet"))
    argv = ["eval", "paper-image", str(place / "vlm"), "--data-root", str(tmp_path), "--only", "pope",
            "--out", str(tmp_path / "out"), "--max-new-tokens", "4", "--limit", "2"]  # fmt: skip
    assert main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "voco eval: error: pope: lmms-eval cannot read its data: KeyError: 'answer'" in last


def test_a_picture_that_is_broken_is_named(place: Path, tmp_path: Path, capsys) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = place / "sets" / "lmms-lab-encoder" / "POPE" / "data" / "test-00000-of-00001.parquet"
    table = pq.read_table(source)
    images = table.column("image").to_pylist()
    images[1] = {"bytes": b"no picture", "path": None}
    at = table.column_names.index("image")
    field = table.schema.field("image")
    (tmp_path / "POPE").mkdir()
    broken = table.set_column(at, field, pa.array(images, type=field.type))
    pq.write_table(
        broken.replace_schema_metadata(table.schema.metadata), tmp_path / "POPE" / "test-0.parquet"
    )
    argv = ["eval", "paper-image", str(place / "vlm"), "--data-root", str(tmp_path), "--only", "pope",
            "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]  # fmt: skip
    assert main(argv) == 2
    assert "pope question 1 cannot be shown" in capsys.readouterr().err.splitlines()[-1]


def test_likelihood_tasks_run_under_force_simple(place: Path) -> None:
    found = harness(
        place, "simple", "", "--force_simple", "--batch_size", "8", tasks="voco_gridworld_choice,pope"
    )
    listed = found[0]["voco_gridworld_choice"]
    for one in listed:
        losses = [float(loss) for loss, _ in one["filtered_resps"]]  # written as text
        assert all(loss > 0 for loss in losses)
        assert one["acc"] == float(losses.index(min(losses)) == int(one["target"]))
    assert found[1]["voco_gridworld_choice"]["acc,none"] == pytest.approx(
        sum(one["acc"] for one in listed) / len(listed)
    )
    assert answers({"pope": found[0]["pope"]})["pope"]


def test_a_wrong_argument_is_said_before_a_model_is_loaded(place: Path) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", "voco", "--tasks", "pope", "--model_args",
               f"pretrained={place / 'vlm'},num_token=2"]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf")}
    run = subprocess.run(command, cwd=place / "work" / "data", env=env, capture_output=True, text=True)
    assert "no argument 'num_token' (did you mean 'num_tokens'?)" in run.stdout + run.stderr


@pytest.fixture(scope="module")
def videos(place: Path) -> Callable[[str], Path]:
    """Sets of videos in their published files."""
    from videos import pictures as moving
    from videos import write_video

    def written(name: str) -> Path:
        home = place / "videos" / name
        if home.exists():
            return home
        (home / "videos").mkdir(parents=True)
        stems = {"MSVD-QA": ("vid1", "vid2"), "MSRVTT-QA": ("video1", "video2")}[name]
        for number, stem in enumerate(stems):
            # copied, as one encoder gives the same pictures other bits when its threads meet otherwise
            if not (once := place / f"moving{number}.mp4").exists():
                write_video(once, count=20, images=moving(20, seed=number))
            shutil.copy(once, home / "videos" / f"{stem}.mp4")
        records = [{"id": n, "video_id": n % 2 + 1, "question": f"what is {n}?",
                    "answer": ("yes", "no")[n // 2 % 2]} for n in range(8)]  # fmt: skip
        (home / "test_qa.json").write_text(json.dumps(records), encoding="utf-8")
        return home

    return written


def test_sets_of_videos_run_and_frames_are_compressed_once(place: Path, videos: Any, capsys) -> None:
    videos("MSVD-QA"), videos("MSRVTT-QA")
    argv = ["eval", "paper-video", str(place / "vlm"), "--data-root", str(place / "videos"), "--only",
            "MSVD-QA,MSRVTT-QA", "--num-frames", "4", "--out", str(place / "video"), "--json",
            "--max-new-tokens", "16"]  # fmt: skip
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    ran = report["runs"]["voco"]
    assert ran["MSVD-QA"]["asked"] == 8 and ran["MSVD-QA"]["compressed"] == 2 * 4
    assert ran["MSRVTT-QA"]["compressed"] == 0  # the same pictures
    assert any("published figures come from a judge" in note for note in report["notes"])
    shutil.rmtree(place / "video")
