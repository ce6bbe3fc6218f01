"""easy-VQA as published: a small package of its shape, and the real one where it is installed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from commands import error_of
from voco_plugin.cli.study_file import count_rows
from voco_plugin.data.easy_vqa import easy_vqa_folder, kind_of, read_easy_vqa
from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.evaluation.metrics import questions_of
from voco_plugin.evaluation.study.run_keys import fingerprint, with_fingerprints
from voco_plugin.files import package_folders

ASKED = {
    "train": [
        ["what is the blue shape?", "circle", 0],
        ["what color is the shape?", "blue", 0],
        ["is there a red shape?", "no", 0],
        ["what is the color of the triangle?", "red", 7],
    ],
    "test": [["is there not a circle?", "yes", 3]],
}


def write(folder: Path, asked=ASKED, answers="circle\nblue\nno\nred\nyes\n") -> Path:
    for split, entries in asked.items():
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "questions.json").write_text(json.dumps(entries))
        for number in {entry[2] for entry in entries}:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / split / "images" / f"{number}.png")
    (folder / "answers.txt").write_text(answers)
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package `shapes_vqa` whose code must not run."""
    folder = tmp_path / "site" / "shapes_vqa"
    write(folder / "data")
    (folder / "__init__.py").write_text("raise RuntimeError('it is not to be run')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_a_conversation_has_all_questions_about_its_image(package):
    for source in ("package:shapes_vqa", package, package / "data", str(package) + "/"):
        found = load_vision_dataset(source)
        assert found["id"] == ["train-0", "train-7"]
        assert found[0]["types"] == ["shape", "color", "yes/no"] and found[1]["types"] == ["color"]
        assert found[1]["images"][0].convert("RGB").getpixel((0, 0)) == (7, 0, 0)
    parts = [[part["text"] or part["type"] for part in m["content"]] for m in found[0]["messages"]]
    assert parts == [
        ["image", "what is the blue shape?"], ["circle"], ["what color is the shape?"], ["blue"],
        ["is there a red shape?"], ["no"],
    ]  # fmt: skip


def test_the_test_split_is_asked_question_by_question(package):
    (asked,) = questions_of(load_vision_dataset("package:shapes_vqa", "test"))
    assert (asked.text, asked.answer, asked.type) == ("is there not a circle?", "yes", "yes/no")
    assert count_rows("package:shapes_vqa") == 2 and count_rows("package:shapes_vqa", "test") == 1


def test_what_is_wrong_is_named(tmp_path, package):
    with pytest.raises(FileNotFoundError, match="package:not_there: no package of that name is installed"):
        load_vision_dataset("package:not_there")
    with pytest.raises(ValueError, match="package:json: the package json holds no set that is known here"):
        load_vision_dataset("package:json")
    with pytest.raises(ValueError, match="has no split 'val': give one of train, test"):
        load_vision_dataset(package, "val")
    with pytest.warns(UserWarning, match="image_folder is ignored"):
        load_vision_dataset(package, image_folder=tmp_path)
    bad = {
        "answers": ([["is it?", "maybe", 0]], r"question 0 has the answer 'maybe', which is none of answers"),
        "form": ([["is it?", "no", 0], ["is it?", "no"]], r"question 1 is \['is it\?', 'no'\]: easy-VQA's"),
        "words": ([["is it?", 3, 0]], "question 0 is"),
        "empty": ([], "holds no list of questions"),
    }
    for name, (entries, message) in bad.items():
        folder = tmp_path / name
        write(folder, {"train": ASKED["train"]})
        (folder / "train" / "questions.json").write_text(json.dumps(entries))
        with pytest.raises(ValueError, match=message):
            load_vision_dataset(folder)
    (package / "data" / "train" / "images" / "7.png").unlink()
    with pytest.raises(ValueError, match=r"asks about 1 images that are not in .*, the first being 7.png"):
        load_vision_dataset(package)
    assert len(load_vision_dataset(package, missing_images=True)) == 2


def test_the_command_line_says_before_it_works_what_is_not_installed(capsys):
    data = ("--dataset_name", "package:not_there")
    said = error_of(capsys, "train", "gridworld_voco", "--model_name_or_path", "a/b", *data)
    assert "package:not_there: no package of that name is installed" in said


def test_a_studys_keys_are_of_what_the_package_holds(package):
    before = fingerprint("package:shapes_vqa")
    assert with_fingerprints({"llm": "package:shapes_vqa"}, fingerprint) == {"llm": before}
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"1")
    fingerprint.cache_clear()
    assert fingerprint("package:shapes_vqa") == before
    (package / "data" / "answers.txt").write_text("other")
    fingerprint.cache_clear()
    assert fingerprint("package:shapes_vqa") != before
    assert fingerprint("package:not_there") == "name:package:not_there"


def blind(asked: dict[str, list]) -> float:
    """The guesser who sees no image: per question text, the answer that is right most often in training."""
    answers = defaultdict(Counter)
    for question, answer, _ in asked["train"]:
        answers[question][answer] += 1
    right = [answers[q].most_common(1)[0][0] == answer for q, answer, _ in asked["test"]]
    return sum(right) / len(right)


@pytest.mark.skipif(
    package_folders("easy_vqa") is None, reason="easy-vqa is not installed: pip install easy-vqa"
)
def test_the_published_set_is_read_whole():
    folder = easy_vqa_folder("package:easy_vqa")
    records = {split: read_easy_vqa(folder, split)[0] for split in ("train", "test")}
    assert {split: len(rows) for split, rows in records.items()} == {"train": 4000, "test": 1000}
    turns = {split: sum(len(row["types"]) for row in rows) for split, rows in records.items()}
    assert turns == {"train": 38575, "test": 9673}
    kinds = Counter(kind for row in records["test"] for kind in row["types"])
    assert kinds == {"yes/no": 7136, "shape": 1257, "color": 1280}
    asked = {
        split: [tuple(entry) for entry in json.loads((folder / split / "questions.json").read_text())]
        for split in records
    }
    assert all(kind_of(q, a) in kinds for q, a, _ in asked["train"])
    assert round(100 * blind(asked), 1) == 67.0  # as docs/training.md says
    assert load_vision_dataset("package:easy_vqa", "test")[999]["images"][0].size == (64, 64)
