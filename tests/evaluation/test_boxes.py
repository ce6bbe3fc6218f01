"""Boxes in words: overlap as pixels count it, text there and back, and what the picture shows."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from voco_plugin.evaluation.boxes import box_text, iou, located, parse_box
from voco_plugin.evaluation.metrics import Question, questions_of, score


def counted(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Intersection over union by counting the squares of a raster."""
    masks = []
    for x0, y0, x1, y1 in (first, second):
        mask = np.zeros((100, 100), dtype=bool)
        mask[y0:y1, x0:x1] = True
        masks.append(mask)
    union = (masks[0] | masks[1]).sum()
    return (masks[0] & masks[1]).sum() / union if union and all(m.any() for m in masks) else 0.0


def test_overlap_is_what_counting_pixels_gives() -> None:
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(2000):
        base = rng.integers(0, 90, 4)
        first = (*base[:2], *(base[:2] + rng.integers(0, 30, 2)).clip(max=99))
        second = tuple((np.array(first) + rng.integers(-9, 10, 4)).clip(0, 99))
        found = iou(first, second)
        assert found == pytest.approx(counted(first, second), abs=1e-12), (first, second)
        seen[round(found, 1)] += 1
    assert len(seen) > 8, "every degree of overlap was met"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # they touch
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
        ((5, 5, 5, 9), (5, 5, 5, 9), 0.0),  # no area
        ((9, 0, 1, 10), (1, 0, 9, 10), 0.0),  # edges crossed
    ],
)
def test_overlap_at_its_corners(first, second, expected) -> None:
    assert iou(first, second) == iou(second, first) == expected


def test_text_of_a_box_is_two_digits_an_edge_and_comes_back() -> None:
    assert box_text((0, 0, 48, 48), 48, 48) == "[00,00,99,99]"
    assert box_text((3, 6, 15, 18), 48, 48) == "[06,12,31,37]"
    assert box_text((10, 10, 20, 20), 100, 40) == "[10,25,20,50]", "each axis by its own side"
    rng = np.random.default_rng(1)
    for _ in range(300):
        x0, y0 = rng.integers(0, 40, 2)
        box = (x0, y0, x0 + rng.integers(1, 9), y0 + rng.integers(1, 9))
        back = parse_box("it is at " + box_text(box, 48, 48) + ".")
        assert np.abs(np.array(back) * 48 / 99 - box).max() <= 0.25, "to half a step of 48/99 pixels"


def test_a_box_outside_the_image_or_empty_has_no_text() -> None:
    for box in ((0, 0, 49, 10), (-1, 0, 4, 4), (5, 5, 5, 9), (9, 0, 3, 4)):
        with pytest.raises(ValueError, match="is empty or not inside an image of 48 x 48"):
            box_text(box, 48, 48)


def test_located_from_one_half_and_never_by_text_without_a_box() -> None:
    assert located("[00,00,10,05]", "[00,00,10,10]") and not located("[00,00,10,04]", "[00,00,10,10]")
    assert located(" [ 0, 0, 9, 10 ] ", "[00,00,10,10]")
    for text in ("", "red circle", "[00,00,10]", "[00,00,10,10", "[a,b,c,d]"):
        assert not located(text, "[00,00,10,10]")
    with pytest.raises(ValueError, match=r"'red' is no box: a question of type rec"):
        located("[00,00,10,10]", "red")


def test_a_score_judges_each_type_by_its_own_measure() -> None:
    asked = [
        Question(0, "q", "[00,00,10,10]", "rec"),
        Question(0, "q", "[00,00,10,10]", "rec"),
        Question(0, "q", "red circle", "reg"),
        Question(0, "q", "[00,00,10,10]", "other"),
    ]
    found = score(asked, ["[00,00,10,08]", "[50,50,60,60]", "red square", "[00,00,10,08]"])
    assert found.by_type == {"rec": 0.5, "reg": 0.0, "other": 0.0} and found.accuracy == 0.25


# -- in the gridworld


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("sklearn", reason="gridworld draws scikit-learn's digits")
    from voco_plugin.cli import main

    out = tmp_path_factory.mktemp("boxes") / "world"
    words = ["gridworld", str(out), "--level", "large", "--boxes", "--num-train", "300", "--num-test", "80"]
    assert main(words) == 0
    return out


def test_boxes_are_those_of_the_pixels(world) -> None:
    from voco_plugin.data.loaders import load_vision_dataset

    scenes = json.loads((world / "scenes.json").read_text())
    for row in load_vision_dataset(world / "test.json"):
        image = np.asarray(row["images"][0].convert("RGB")).astype(int)
        scene = scenes[row["id"]]
        assert image.shape == (scene["side"], scene["side"], 3)
        shade = Counter(map(tuple, image.reshape(-1, 3))).most_common(1)[0][0][0]
        cell_pixels = scene["side"] // scene["grid"]
        for name, cell in scene["cells"].items():
            left, top = "abc".index(name[0]) * cell_pixels, (int(name[1]) - 1) * cell_pixels
            part = image[top : top + cell_pixels, left : left + cell_pixels] - shade
            if "digit" in cell:  # white ink: a twentieth of it is seen
                inked = part[..., 0] * 255 / (235 - shade) > 11.5
            else:
                inked = np.abs(part).max(-1) > 3
            rows, columns = np.nonzero(inked)
            seen = [left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1]
            assert cell["box"] == seen, (row["id"], name)


def test_no_conversation_names_a_box_twice(world) -> None:
    for split in ("train", "test"):
        for row in json.loads((world / f"{split}.json").read_text()):
            boxes = re.findall(r"\[.*?\]", " ".join(turn["value"] for turn in row["conversations"]))
            assert len(boxes) == len(set(boxes)) and boxes


def test_a_blind_guesser_locates_little(world) -> None:
    blind = json.loads((world / "meta.json").read_text())["blind_accuracy"]
    assert blind["rec"] < 0.25 and blind["reg"] < 0.25


def test_the_score_of_true_and_of_shifted_boxes(world) -> None:
    """`voco eval` scores with these: boxes moved by half an object are wrong."""
    from voco_plugin.data.loaders import load_vision_dataset

    questions = questions_of(load_vision_dataset(world / "hf", split="test").remove_columns("images"))
    assert {q.type for q in questions} >= {"rec", "reg", "object", "sum"}
    assert score(questions, [q.answer for q in questions]).accuracy == 1.0

    def moved(text: str, by: int) -> str:
        x0, y0, x1, y1 = (int(n) for n in re.findall(r"\d+", text))
        return f"[{x0 + by},{y0 + by},{x1 + by},{y1 + by}]"

    located_ones = [q for q in questions if q.type == "rec"]
    assert score(located_ones, [moved(q.answer, 2) for q in located_ones]).accuracy == 1.0
    assert score(located_ones, [moved(q.answer, 12) for q in located_ones]).accuracy == 0.0


def test_coordinates_are_single_tokens() -> None:
    pytest.importorskip("sklearn", reason="gridworld draws scikit-learn's digits")
    from voco_plugin.gridworld.tiny_processor import build_tokenizer

    for name in ("words", "terse", "phrases"):
        tokenizer = build_tokenizer(name, boxes=True)
        for number in range(100):
            text = f" What is in [{number:02d},05,99,{99 - number:02d}]"
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == 12 and tokenizer.decode(ids) == text
