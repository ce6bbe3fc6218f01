"""Data and runs that the trainings share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image, List
from PIL import Image as PILImage

from launched import Place
from recipe_twins import ANSWERS
from trainers import picture, rows

FRAMES = (1, 3, 0, 5, 2, 2, 4, 1)
"""Images of each row."""


@pytest.fixture(scope="session")
def data() -> Dataset:
    """Eight rows, one of them without an image; with ids."""
    return rows()


@pytest.fixture(scope="session")
def videos() -> Dataset:
    image, ask = {"type": "image", "text": None}, {"type": "text", "text": "what is it"}
    answers = ["red", "blue circle", "green square"]
    messages = [
        [
            {"role": "user", "content": [*[image] * n, ask]},
            {"role": "assistant", "content": [{"type": "text", "text": answers[i % 3]}]},
        ]
        for i, n in enumerate(FRAMES)
    ]
    images = [[picture(10 * i + j) for j in range(n)] for i, n in enumerate(FRAMES)]
    return Dataset.from_dict({"messages": messages, "images": images}).cast_column("images", List(Image()))


@pytest.fixture(scope="session")
def recipe_data(tmp_path_factory) -> Path:
    """A LLaVA JSON with one and two turns, and a row without an image."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 24, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat is it?"},
            {"from": "gpt", "value": ANSWERS[i % 3]},
        ]
        if i % 2:
            turns += [{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("distributed"))
