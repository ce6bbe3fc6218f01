"""Suites: a benchmark's figure from logged questions, its data laid out, the table with its bounds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import paper_tables
from voco_plugin.evaluation import published
from voco_plugin.evaluation.suite_data import files_of, homes, prepare, set_file
from voco_plugin.evaluation.suite_table import build_rows, markdown
from voco_plugin.evaluation.suites import SUITES, Benchmark, Wanted, combine, score

BY_NAME = {one.name: one for suite in SUITES.values() for one in suite}
MEAN = Benchmark("x", "x", "exact_match")


def asked(values: list[float], images: list[str] | None = None) -> list[dict]:
    return [
        {"doc_id": n, "exact_match": value, "images": [images[n]] if images else []}
        for n, value in enumerate(values)
    ]


def pope(*pairs: tuple[str, str]) -> list[dict]:
    return [{"pope_f1_score": {"ground_truth": truth, "prediction": said}} for truth, said in pairs]


def test_popes_f1_counts_as_the_harness_counts() -> None:
    """Answers that are neither yes nor no are in no count; no true positive is 0, not nothing."""
    given = pope(("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("yes", "maybe"), ("no", "what"))
    assert score(BY_NAME["POPE"], given) == pytest.approx(100 * 2 / (2 + 2))
    assert score(BY_NAME["POPE"], pope(("yes", "no"), ("no", "no"))) == 0.0


def test_mmes_points_are_accuracy_and_accuracy_plus_of_each_class() -> None:
    def one(category: str, image: str, right: int) -> dict:
        return {"mme_perception_score": {"category": category, "question_id": image, "score": float(right)}}

    given = [one("count", "a", 1), one("OCR", "b", 1), one("count", "a", 1), one("OCR", "b", 0),
             one("OCR", "c", 0), one("OCR", "c", 0), {"mme_cognition_score": {}}]  # fmt: skip
    # count: 100 + 100; OCR: images of 50 and 0, mean 25
    assert score(BY_NAME["MME"], given) == 225.0
    with pytest.raises(ValueError, match="none of 1 questions is a pair"):
        score(BY_NAME["MME"], given[:1])


def test_a_box_counts_from_half_an_overlap() -> None:
    def one(box: list[float]) -> dict:
        return {"refcoco_ACC@0.5": {"bbox": [0.0, 0.0, 1.0, 1.0], "pred": box}}

    given = [one([0, 0, 1, 0.5]), one([0, 0, 1, 0.49]), one([0, 0, 0, 0])]
    assert score(BY_NAME["RefCOCO val"], given) == pytest.approx(100 / 3)


def test_seeds_videos_are_no_part_of_its_image_figure() -> None:
    given = [{"seed_image": {"pred": "A", "answer": "A"}}, {"seed_video": {"pred": "A", "answer": "B"}}]
    assert score(BY_NAME["SEED"], given) == 100.0
    with pytest.raises(ValueError, match="none of 1 questions counts"):
        score(BY_NAME["SEED"], given[1:])


def test_rotations_of_a_question_are_no_questions_of_their_own() -> None:
    given = [{"gpt_eval_score": {"index": n}, "hit": hit, "counted": n < 1_000_000}
             for n, hit in ((1, 1.0), (2, 0.0), (1_000_001, 1.0))]  # fmt: skip
    assert score(BY_NAME["MMB"], given) == 50.0


@pytest.mark.parametrize("name", [name for name in BY_NAME if BY_NAME[name].kind != "by_class"])
def test_sums_scaled_alike_are_the_same_score(name: str) -> None:
    """Which the bootstrap stands on: it hands over means, not sums."""
    one = BY_NAME[name]
    sums = np.array([[3.0, 2.0, 1.0]]) if one.kind == "f1" else np.array([[3.0, 6.0]])
    assert combine(one, sums / 7) == pytest.approx(combine(one, sums))


# -- the table


def runs(**rows: list[dict]) -> dict:
    return {name: {"x": {"samples": samples, "score": None}} for name, samples in rows.items()}


def test_ratio_and_retention_are_paired_over_images() -> None:
    images = [f"image{n // 2:020d}" for n in range(8)]
    up, low, mid = [1.0] * 8, [0.0] * 6 + [1, 0], [1, 0, 1, 0, 1, 0, 1, 0]
    given = runs(upper=asked(up, images), voco=asked(mid, images), lower=asked(low, images))
    rows = {r.name: r for r in build_rows([MEAN], given, {"upper": "upper", "lower": "lower"}, {"voco": 1})}
    cell = rows["voco"].cells["x"]
    assert (cell.score, cell.questions, cell.images) == (50.0, 8, 4)
    assert cell.ratio == pytest.approx(100 * 4 / 8)
    assert cell.retention == pytest.approx(100 * (4 - 1) / (8 - 1))
    # every image has one right answer of voco: its own interval has no width, whichever images are drawn
    assert cell.interval == pytest.approx((50.0, 50.0), abs=1e-4)
    assert rows["upper"].cells["x"].retention_interval == pytest.approx((100.0, 100.0), abs=1e-3)
    assert cell.ratio_interval == pytest.approx((50.0, 50.0), abs=1e-3)
    low, high = cell.retention_interval  # one image of four keeps a half without vision
    assert 0 <= low < cell.retention < high <= 50.001
    assert rows["voco"].average_ratio == cell.ratio


def test_a_bound_that_the_other_reaches_gives_no_retention() -> None:
    given = runs(upper=asked([1, 0]), voco=asked([1, 1]), lower=asked([0, 1]))
    rows = build_rows([MEAN], given, {"upper": "upper", "lower": "lower"}, {})
    assert [row.cells["x"].retention for row in rows] == [None] * 3
    assert [row.average_retention for row in rows] == [None] * 3


def test_a_draw_in_which_the_bounds_meet_leaves_no_interval() -> None:
    images = ["a", "a", "b", "b"]
    given = runs(upper=asked([1, 1, 0, 1], images), voco=asked([1, 0, 1, 0], images),
                 lower=asked([0, 0, 0, 1], images))  # fmt: skip
    cell = build_rows([MEAN], given, {"upper": "upper", "lower": "lower"}, {})[1].cells["x"]
    assert cell.retention == pytest.approx(50.0) and cell.retention_interval is None


def test_rows_over_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="did not answer the same questions"):
        build_rows([MEAN], runs(a=asked([1, 0]), b=asked([1])), {}, {})


def test_published_rows_are_the_papers() -> None:
    rows = {(row.name, row.tokens): row for row in published.ROWS["paper-image"]}
    upper = rows["VoCo-LLaMA (paper), upper bound", 576]
    assert list(upper.scores.values()) == paper_tables.TABLE_1_UPPER
    assert list(rows["VoCo-LLaMA (paper)", 1].scores.values()) == paper_tables.TABLE_1["VoCo-LLaMA"][0]
    assert list(rows["Q-Former (paper)", 1].scores.values()) == paper_tables.TABLE_1["Q-Former"][0]
    assert rows["HTC-VLM (its paper)", 1].average == 87.2
    fine = {(row.name, row.tokens): row for row in published.ROWS["paper-fine"]}
    for k in (1, 8):
        assert list(fine["VoCo-LLaMA (paper)", k].scores.values()) == paper_tables.TABLE_5[k][0][:-1]
    assert set(published.ROWS) == set(SUITES)
    for suite, listed in published.ROWS.items():
        names = {one.name for one in SUITES[suite]}
        assert all(set(row.scores) <= names for row in listed)


def test_the_report_sets_published_rows_beside_measured_ones() -> None:
    def made(value: float) -> dict:
        return {"GQA": {"samples": asked([value, 1.0, 0.0]), "score": (value + 1) / 3}}

    given = {"upper": made(1.0), "voco": made(1.0), "lower": made(0.0)}
    suite = SUITES["paper-image"]
    rows = build_rows(suite, given, {"upper": "upper", "lower": "lower"}, {"voco": 1})
    text = markdown("paper-image", suite, rows, ["a note"])
    scores, ratio, retention = text.split("## ")[1:]
    assert "| voco | 1 | 66.7" in scores and "| *VoCo-LLaMA (paper)* | 1 | 57.0 |" in scores
    assert "MMB" not in scores.splitlines()[2]  # nothing was measured of it
    assert "| *VoCo-LLaMA (paper)* | 1 | 93.3 | 93.3 |" in ratio
    assert "| *VoCo-LLaMA (paper)* | 1 | 82.5 | 82.5 |" in retention
    assert "| *HTC-VLM (its paper)* | 1 | – | 87.2 |" in retention and "- a note." in retention
    alone = build_rows(suite, {"voco": made(1.0)}, {}, {})
    assert "no upper bound among the rows" in markdown("paper-image", suite, alone, [])


# -- the data


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"PAR1")
    return path


@pytest.mark.parametrize(
    "place",
    [
        "lmms-lab-encoder/POPE/data/test-00000-of-00001.parquet",
        "lmms-lab/POPE/data/test-00000-of-00001.parquet",
        "POPE/test-00000-of-00001.parquet",
        "datasets--lmms-lab-encoder--POPE/snapshots/abc/data/test-00000-of-00001.parquet",
        "a, b/POPE/test.parquet",
    ],
)
def test_a_set_is_found_where_people_have_it(tmp_path: Path, place: str) -> None:
    home = tmp_path / place.split("/")[0] if place.startswith("a,") else tmp_path
    file = touch(tmp_path / place)
    prepare([BY_NAME["POPE"]], home, tmp_path / "work")
    work = tmp_path / "work" / "lmms-lab-encoder" / "POPE"
    (link,) = work.glob("*.parquet")
    assert link.resolve() == file
    assert f'- config_name: "default"\n  data_files:\n  - split: "test"\n    path:\n    - "{link.name}"' in (
        work / "README.md"
    ).read_text(encoding="utf-8")


def test_the_repositorys_own_card_says_which_files_are_a_split(tmp_path: Path) -> None:
    home = tmp_path / "lmms-lab-encoder" / "RefCOCO"
    mine = touch(home / "parts" / "first.parquet")
    touch(home / "data" / "val-00000.parquet")
    card = "configs:\n- config_name: default\n  data_files:\n  - split: val\n    path: parts/f*.parquet"
    (home / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    want = Wanted("lmms-lab-encoder/RefCOCO", "default", "val")
    assert files_of(want, homes(want.repository, tmp_path)) == [mine]


def test_what_is_missing_is_named_all_at_once_with_its_place(tmp_path: Path) -> None:
    touch(tmp_path / "POPE" / "test.parquet")
    with pytest.raises(FileNotFoundError) as problem:
        prepare(SUITES["paper-image"], tmp_path, tmp_path / "work")
    said = str(problem.value)
    place = tmp_path / "lmms-lab-encoder"
    assert f"testdev_balanced_images/testdev-*.parquet in {place / 'GQA'}" in said
    assert f"data/validation-*.parquet in {place / 'VQAv2'}" in said
    assert "POPE in" not in said and "--only" in said
    with pytest.raises(FileNotFoundError, match="--data-root .*nowhere is no folder"):
        prepare([], tmp_path / "nowhere", tmp_path / "work")


def test_a_second_run_lays_out_what_is_there_then(tmp_path: Path) -> None:
    first = touch(tmp_path / "POPE" / "test-00000-of-00002.parquet")
    touch(tmp_path / "POPE" / "test-00001-of-00002.parquet")
    work = tmp_path / "work" / "lmms-lab-encoder" / "POPE"
    prepare([BY_NAME["POPE"]], tmp_path, tmp_path / "work")
    assert len(list(work.glob("*.parquet"))) == 2
    first.unlink()
    prepare([BY_NAME["POPE"]], tmp_path, tmp_path / "work")
    assert len(list(work.glob("*.parquet"))) == 1


def test_other_files_are_never_taken_for_those_read_before(tmp_path: Path) -> None:
    """``datasets`` keeps what it has read under a hash of the card alone."""
    cards = []
    for home in ("a", "b"):
        file = touch(tmp_path / home / "POPE" / "test.parquet")
        for stamp in (1, 2):
            os.utime(file, (stamp, stamp))
            prepare([BY_NAME["POPE"]], tmp_path / home, tmp_path / "work")
            prepare([BY_NAME["POPE"]], tmp_path / home, tmp_path / "other")
            found = [
                tmp_path / work / "lmms-lab-encoder" / "POPE" / "README.md" for work in ("work", "other")
            ]
            one, two = (card.read_text(encoding="utf-8") for card in found)
            assert one == two
            cards.append(one)
    assert len(set(cards)) == 4


def test_videos_of_a_published_set_get_their_paths(tmp_path: Path) -> None:
    home = tmp_path / "MSVD-QA"
    record = {"id": 3, "video_id": 1, "question": "what is it?", "answer": "dog"}
    home.mkdir()
    (home / "test_qa.json").write_text(json.dumps([record]), encoding="utf-8")
    one = BY_NAME["MSVD-QA"]
    with pytest.raises(FileNotFoundError, match=f"a folder videos in {home}"):
        prepare([one], tmp_path, tmp_path / "work")
    video = touch(home / "videos" / "vid1.avi")
    prepare([one], tmp_path, tmp_path / "work")
    (line,) = set_file(tmp_path / "work", one.task).read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "id": "3", "question": "what is it?", "answer": "dog", "type": "what", "video": str(video)
    }  # fmt: skip


def test_no_shipped_task_has_the_name_of_a_folder_of_the_work(tmp_path: Path) -> None:
    """The harness takes ``--tasks NAME`` for a folder of tasks where there is one of that name."""
    for one in (*SUITES["paper-video"], *SUITES["gridworld"]):
        assert one.task not in set_file(tmp_path, one.task).relative_to(tmp_path).parts
