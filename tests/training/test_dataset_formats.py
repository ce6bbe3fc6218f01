"""Datasets with a transform or a format of the user's train on what they give, as plain rows of it would."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, Image
from PIL.Image import Transpose
from torch.utils.data import Dataset as TorchDataset

import tiny
from tiny import processors
from trainers import picture, trainer
from voco_plugin.data.lazy_images import undecoded

ASK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]
SAID = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "red"}]
PLAIN = {"max_steps": 1, "on_bad_sample": "skip"}


def flipped(images):
    return [image.transpose(Transpose.FLIP_LEFT_RIGHT) for image in images]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("formats") / "base")
    tiny.build("llava_llama").save_pretrained(folder)
    processors.processor("llava_llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def said() -> Dataset:
    columns = {"conversations": [SAID] * 4, "image": [picture(n) for n in range(4)]}
    return Dataset.from_dict(columns).cast_column("image", Image())


def batches(made, evaluates=False) -> list:
    loader = made.get_eval_dataloader() if evaluates else made.get_train_dataloader()
    return [{k: v for k, v in batch.items() if k != "row"} for batch in loader]


def same(found, expected) -> None:
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def turned(batch):
    return {**batch, "images": [flipped(images) for images in batch["images"]]}


def written(batch):
    return {"conversations": batch["conversations"], "image": flipped(batch["image"])}


def made_up(batch):
    return {"messages": [ASK for _ in batch["seed"]], "images": [[picture(seed)] for seed in batch["seed"]]}


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("kind", ["messages", "conversations", "columns of another name"])
def test_a_transform_gets_images_and_what_it_gives_is_read(base, data, said, tmp_path, kind, evaluates):
    if kind == "messages":
        rows = data.with_transform(turned)
        expected = Dataset.from_list([{**row, "images": flipped(row["images"])} for row in data])
    elif kind == "conversations":
        rows = said.with_transform(written)
        expected = Dataset.from_list([{**r, "image": flipped([r["image"]])[0]} for r in said])
    else:
        rows = Dataset.from_dict({"seed": [3, 1, 2, 5]})
        rows.set_transform(made_up)
        expected = Dataset.from_list(
            [{"messages": ASK, "images": [picture(seed)]} for seed in rows.data["seed"].to_pylist()]
        )

    def of(given):
        first = {"eval_dataset": given} if evaluates else {}
        return batches(trainer(base, tmp_path, data if evaluates else given, **first, **PLAIN), evaluates)

    same(of(rows), of(expected))


@pytest.mark.parametrize("format", ["numpy", "torch", "arrow", "pandas"])
@pytest.mark.parametrize("kind", ["messages", "conversations"])
def test_a_format_changes_nothing(base, data, said, tmp_path, kind, format):
    rows = data if kind == "messages" else said
    made = trainer(base, tmp_path, rows.with_format(format), **PLAIN)
    same(batches(made), batches(trainer(base, tmp_path, rows, **PLAIN)))


def test_a_format_of_some_columns_keeps_to_them_and_one_of_pixels_stays(data):
    rows = undecoded(data.with_format("torch", columns=["messages", "images"]))
    assert set(rows[0]) == {"messages", "images"} and set(rows[0]["images"][0]) == {"bytes", "path"}
    pixels = Dataset.from_dict({"image": [[[1, 2], [3, 4]]]}).with_format("numpy")
    assert undecoded(pixels)[0]["image"].shape == (2, 2)


def test_packing_takes_transformed_rows(base, said, tmp_path):
    made = trainer(base, tmp_path, said.with_transform(written), packing=True, max_length=256, max_steps=1)
    made.train()
    assert made.train_dataset.groups


def test_a_torch_dataset_of_conversations_is_evaluated(base, data, said, tmp_path):
    class Rows(TorchDataset):
        def __len__(self):
            return len(said)

        def __getitem__(self, index):
            return said[range(len(said))[index]]

    found = batches(trainer(base, tmp_path, data, eval_dataset=Rows(), **PLAIN), True)
    same(found, batches(trainer(base, tmp_path, data, eval_dataset=said, **PLAIN), True))
