"""Conversations of many lengths and image sizes, to be packed."""

from __future__ import annotations

import functools
import itertools

import numpy as np
from datasets import Dataset, Image, List
from PIL import Image as PILImage

import voco_plugin as vp

SIZES = [(16, 24), (24, 16), (40, 18), (12, 12)]


WORDS = "what is it red blue green circle square one two three".split()


def picture(seed: int) -> PILImage.Image:
    shape = SIZES[seed % len(SIZES)]
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (*shape, 3), dtype=np.uint8))


def conversation(i: int) -> dict:
    """Of one to three turns, with no, one or two images of several sizes."""
    draw = np.random.default_rng(i)
    images = [picture(10 * i + j) for j in range([1, 1, 2, 0, 1][i % 5])]
    turns = []
    for turn in range(1 + i % 3):
        said = " ".join(draw.choice(WORDS, int(draw.integers(1, 12))))
        content = [{"type": "text", "text": said}]
        if turn == 0:
            content = [{"type": "image", "text": None}] * len(images) + content
        turns.append({"role": "user", "content": content})
        answer = {"type": "text", "text": " ".join(draw.choice(WORDS, int(draw.integers(1, 8))))}
        turns.append({"role": "assistant", "content": [answer]})
    return {"messages": turns, "images": images, "id": f"row-{i}"}


@functools.cache
def conversations(count: int = 24) -> Dataset:
    rows = [conversation(i) for i in range(count)]
    whole = {key: [row[key] for row in rows] for key in rows[0]}
    return Dataset.from_dict(whole).cast_column("images", List(Image()))


OPTIONS = {"packing": True, "max_length": 220, "per_device_train_batch_size": 2}


class Unpacked(vp.VoCoDataCollator):
    """The same conversations a batch, each in a row of its own."""

    def torch_call(self, examples):
        return super().torch_call(list(itertools.chain.from_iterable(examples)))
