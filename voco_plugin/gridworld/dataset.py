"""Writes the gridworld: a small visual question answering set with exact answers, in the formats people use.

    out_dir/
      train.json  test.json    LLaVA format: [{"id", "image", "conversations": [{"from", "value"}, …]}, …]
      images/train/000000.png  the images that "image" names, relative to images/
      hf/                      the same as a `datasets` folder (`save_to_disk`; splits train and test) with
                               the columns of TRL's vision format, `messages` and `images`
      scenes.json              what each image holds, cell by cell
      meta.json                the settings, and the accuracy of the best guesser who sees no image

One seed gives the same bytes. Image `i` of a split does not depend on how many are written. The test split
shares with training neither a handwritten digit nor a combination of things in the cells.

What a reader of these files should know:

- `types` (one label per question) stands next to the conversation in both formats; loaders keep it,
  trainers drop it.
- A training conversation ends with the caption turn (`describe`); a test conversation has none. The caption
  comes last because a model could copy later answers from it.
- In a conversation, a later question may have been half answered by an earlier one. To measure what an image
  says, ask each test question alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from voco_plugin.gridworld.levels import level_of, question_types
from voco_plugin.gridworld.questions import QUESTION_TYPES, QuestionType, Turn, ask, blind_accuracy, describe
from voco_plugin.gridworld.row_files import MARKER, prepare_folder, save_hf, write_json, write_split
from voco_plugin.gridworld.scenes import (
    COLORS,
    SPLITS,
    Scene,
    draw_scene,
    paint,
    place,
    sample_placement,
    sample_scene,
)

FORMAT_VERSION = 1


def write_gridworld(
    out_dir: str | Path,
    num_train: int = 8000,
    num_test: int = 500,
    seed: int = 0,
    *,
    level: str = "quickstart",
    grid: int | None = None,
    num_colors: int | None = None,
    num_questions: int | None = None,
    cell_pixels: int | None = None,
    question_set: str | None = None,
    caption: bool | None = None,
    boxes: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the set into `out_dir` and return what `meta.json` holds.

    Args:
        out_dir: folder to make.
        num_train, num_test: images per split.
        seed: the same seed and settings give the same files, byte for byte.
        level: the name of the settings below that are not given (`levels`).
        grid: cells per side, 2…9.
        num_colors: colours in use, 2…6.
        num_questions: questions per image, each a turn of its conversation.
        cell_pixels: pixels per cell side, at least 12.
        question_set: `phrases`; `words` or `terse`: short questions with answers of one word.
        caption: end each training conversation with "Describe the image."
        boxes: ask the fine-grained types too, `rec` and `reg` (`box_questions`); `scenes.json` then has
            each thing's box in pixels. Another world than without, image by image.
        overwrite: replace an earlier gridworld in `out_dir`.

    Raises:
        ValueError: a setting is out of range, or `out_dir` holds something else, or holds a set and not
        `overwrite`. ImportError: scikit-learn is missing.
    """
    named = level_of(level)
    given = {
        "grid": grid, "num_colors": num_colors, "num_questions": num_questions, "cell_pixels": cell_pixels,
    }  # fmt: skip
    world = {name: getattr(named, name) if value is None else value for name, value in given.items()}
    question_set = named.question_set if question_set is None else question_set
    caption = named.caption if caption is None else caption
    types = question_types(question_set, boxes)
    _check(num_train=num_train, num_test=num_test, **world)
    out = Path(out_dir)
    files = ("train.json", "test.json", "scenes.json")
    prepare_folder(out, overwrite, "gridworld", files, ("images", "hf"))
    settings = {
        "num_train": num_train, "num_test": num_test, "seed": seed, **world, "question_set": question_set,
        "caption": caption, "boxes": boxes,
    }  # fmt: skip
    scenes: dict[str, Any] = {}
    turns: dict[str, list[Turn]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, number in zip(SPLITS, (num_train, num_test), strict=True):
        items = (make_item(split, index, seed, **world, types=types, boxes=boxes) for index in range(number))
        told = describe if caption and split == "train" else None
        found, rows[split], turns[split] = write_split(out, split, items, told)
        scenes |= found
    write_json(out / "scenes.json", scenes)
    save_hf(out / "hf", rows)
    blind = blind_accuracy(turns["train"], turns["test"])
    meta = {"format": "gridworld", "version": FORMAT_VERSION, "settings": settings, "blind_accuracy": blind}
    write_json(out / MARKER, meta, indent=2)
    return meta


def make_item(
    split: str,
    index: int,
    seed: int,
    grid: int,
    num_colors: int,
    num_questions: int,
    cell_pixels: int,
    types: Mapping[str, QuestionType] = QUESTION_TYPES,
    boxes: bool = False,
) -> tuple[Scene, list[Turn], bytes]:
    """Item `index` of a split: its scene, its questions, and the image as PNG bytes."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, grid, num_colors, split)
    if boxes:  # questions depend on places, so these are drawn first
        placement = sample_placement(scene, rng, cell_pixels)
        scene = place(scene, placement, cell_pixels)
        asked = ask(scene, rng, num_questions, num_colors, types)
        image = paint(scene, placement, cell_pixels)
    else:
        asked = ask(scene, rng, num_questions, num_colors, types)
        image = draw_scene(scene, rng, cell_pixels)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return scene, asked, buffer.getvalue()


def _check(**values: int) -> None:
    limits = {
        "num_train": (1, 10**6), "num_test": (1, 10**6), "grid": (2, 9), "num_colors": (2, len(COLORS)),
        "num_questions": (1, 64), "cell_pixels": (12, 512),
    }  # fmt: skip
    for name, value in values.items():
        low, high = limits[name]
        if not low <= value <= high:
            raise ValueError(f"{name}={value} is out of range: give {low} to {high}")
