"""``packing: true``: the rows are decided before training, and training is what it would be unpacked."""

# ruff: noqa: F811  (the fixtures of other test files)

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import voco_plugin as vp
from conversations import OPTIONS, Unpacked, conversation, conversations
from launched import Place
from tiny import processors
from trainers import losses, snapshot, trainer
from voco_plugin.core.packed_rows import DOCUMENT_IDS
from voco_plugin.data.images import BadImageError, image_size, open_image
from voco_plugin.training.packing import PackedDataset, pack_dataset, token_counter


@functools.cache
def collator(name: str = "llava_llama", **options) -> vp.VoCoDataCollator:
    voco = vp.VoCoConfig(num_tokens=2, token="<unused0>")
    return vp.VoCoDataCollator(processors.processor(name), voco=voco, **options)


# -- counting


@pytest.mark.parametrize("name", processors.NAMES)
def test_tokens_are_counted_without_pixels(name):
    try:
        made = collator(name)
    except ImportError as error:
        pytest.skip(str(error))
    rows = [conversation(i) for i in range(15)]
    if name == "llava_onevision":  # several images without text between them cannot be told apart there
        rows = [row for row in rows if len(row["images"]) < 2]
    count = token_counter(made)
    counted = [count(row, i) for i, row in enumerate(rows)]
    assert counted == [int(made([row])["attention_mask"].sum()) for row in rows]
    assert counted == made(rows)["attention_mask"].sum(1).tolist()
    assert len(set(counted)) > 5


def test_counting_decodes_nothing_and_asks_once_a_size(monkeypatch):
    calls = []
    made = vp.VoCoDataCollator(processors.processor("qwen2_5_vl"), voco=vp.VoCoConfig(token="<unused0>"))
    kind = type(made.processor.image_processor)
    real = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **k: (calls.append(1), real(self, *a, **k))[1])
    count = token_counter(made)
    messages = conversation(0)["messages"]
    broken = {"bytes": _png((30, 20))[:200], "path": None}  # its head is whole
    with pytest.raises(BadImageError):
        open_image(broken)
    for _ in range(3):
        count({"messages": messages, "images": [broken]}, 0)
    assert len(calls) == 1
    count({"messages": messages, "images": [{"bytes": _png((20, 30)), "path": None}]}, 0)
    assert len(calls) == 2
    assert made.processor.image_processor is not None and type(made.processor.image_processor) is kind


def _png(size) -> bytes:
    import io

    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    PILImage.fromarray(noise).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_image(orientation, tmp_path):
    image = PILImage.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif)
    assert image_size(tmp_path / "x.jpg") == open_image(tmp_path / "x.jpg").size
    with pytest.raises(BadImageError, match=r"row 3: image .*gone.png cannot be read: the file does"):
        image_size(tmp_path / "gone.png", "row 3")


def test_elastic_k_is_counted_at_its_largest():
    row, fixed = conversation(0), token_counter(collator())
    elastic = token_counter(vp.VoCoDataCollator(
        processors.processor("llava_llama"), voco=vp.VoCoConfig(token="<unused0>"), num_tokens=(1, 7)
    ))  # fmt: skip
    assert elastic(row, 0) == fixed(row, 0) + 5


# -- the rows


def test_rows_hold_every_conversation_once_and_no_more_than_they_can():
    made = collator(max_length=160)
    data = conversations()
    packed = pack_dataset(data, made, seed=3)
    assert sorted(i for group in packed.groups for i in group) == list(range(24))
    assert len(packed) < 20
    batch = made([packed[i] for i in range(len(packed))])
    assert batch["input_ids"].shape[1] <= 160
    assert batch[DOCUMENT_IDS].amax(1).tolist() == [len(group) for group in packed.groups]
    assert int(batch["attention_mask"].sum()) / (160 * len(packed)) == pytest.approx(packed.fill)
    assert pack_dataset(data, made, seed=3).groups == packed.groups


def test_processes_share_the_counting(monkeypatch):
    from voco_plugin.training import packing

    made, data = collator(max_length=160), conversations()
    parts = []
    monkeypatch.setattr(packing, "gather_object", lambda own: (parts.append(own[0]), [([], None)])[1])
    for process in range(3):
        with pytest.raises(ValueError, match="no conversation that can be used"):
            pack_dataset(data, made, 3, process, 3)
    assert [len(part) for part, _ in parts] == [8, 8, 8]
    monkeypatch.setattr(packing, "gather_object", lambda own: parts)
    assert pack_dataset(data, made, 3, 1, 3).groups == pack_dataset(data, made, 3).groups
    parts[0] = ([], ValueError("of another process"))
    with pytest.raises(ValueError, match="of another process"):
        pack_dataset(data, made, 3, 1, 3)


def test_a_conversation_that_is_too_long_is_named():
    with pytest.raises(
        ValueError, match=r"row 2 \(id 'row-2'\) of the data set has 136 tokens, more than max_length=40"
    ):
        pack_dataset(conversations(), collator(max_length=40), seed=0)


def test_bad_images_are_left_out_of_their_row(caplog):
    data = [dict(conversation(i)) for i in range(5)]
    whole = _png((30, 20))
    whole = whole[: len(whole) // 2]
    data[0]["images"] = [{"bytes": whole, "path": None}]  # found when it is decoded
    data[1]["images"] = [{"bytes": b"", "path": None}]  # found before
    data[4]["images"] = [{"bytes": whole, "path": None}]
    strict = collator(max_length=200)
    with pytest.raises(BadImageError, match="row 1: image of 0 bytes cannot be read: it is empty"):
        pack_dataset(data, strict, seed=0)
    made = collator(max_length=200, on_bad_sample="skip", count_skipped=True)
    with caplog.at_level("WARNING"):
        packed = pack_dataset(data, made, seed=0)
        assert "row 1: image of 0 bytes" in caplog.text and "Left out" in caplog.text
        batch = made([[data[0], data[2]], [data[4]], [data[3]]])
    assert "its packed row goes on without it" in caplog.text and "takes its place" in caplog.text
    assert sorted(i for group in packed.groups for i in group) == [0, 2, 3, 4]
    assert batch["skipped_samples"].tolist() == [1, 1, 0]
    assert batch[DOCUMENT_IDS].amax(1).tolist() == [1, 1, 1]
    plain = collator(max_length=200)([[data[2]]])
    assert torch.equal(batch["input_ids"][0][batch["attention_mask"][0].bool()], plain["input_ids"][0])


# -- training


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "idefics3"])
def test_losses_are_those_of_the_same_conversations_unpacked(name, bases, tmp_path, capsys):
    made = trainer(bases(name), tmp_path / "packed", conversations(), **OPTIONS, max_steps=2)
    assert isinstance(made.train_dataset, PackedDataset) and made.args.packing
    other = trainer(bases(name), tmp_path / "plain", conversations(), **OPTIONS, max_steps=2)
    given = other.data_collator
    other.data_collator = Unpacked(
        given.processor, max_length=None, voco=given.voco, vocab=given.vocab, dataset_text_field="text"
    )
    before = snapshot(made)
    made.train()
    other.train()
    assert losses(made) == pytest.approx(losses(other), rel=1e-5) and len(losses(made)) == 2
    ends = snapshot(made), snapshot(other)
    for key, value in ends[0].items():
        assert (value - ends[1][key]).abs().max() <= 1e-4, key
    assert any(not torch.equal(before[key], ends[0][key]) for key in before)
    logs = [[e for e in each.state.log_history if "loss" in e] for each in (made, other)]
    for key in ("num_tokens", "voco_tokens_per_sample", "compression_ratio", "mean_token_accuracy"):
        assert [e[key] for e in logs[0]] == pytest.approx([e[key] for e in logs[1]], rel=1e-4), key


def test_the_same_with_gradient_accumulation_and_checkpointing(bases, tmp_path):
    more = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 2}
    options = {**OPTIONS, "per_device_train_batch_size": 1, **more}
    made = trainer(bases("llava_llama"), tmp_path / "packed", conversations(), peft=False, **options)
    other = trainer(bases("llava_llama"), tmp_path / "plain", conversations(), peft=False, **options)
    given = other.data_collator
    other.data_collator = Unpacked(given.processor, voco=given.voco, vocab=given.vocab)
    made.train()
    other.train()
    assert losses(made) == pytest.approx(losses(other), rel=1e-5) and len(losses(made)) == 2


@pytest.mark.parametrize("elastic", [None, [1, 4]])
def test_a_resumed_run_goes_on_with_the_same_rows(bases, tmp_path, elastic):
    options = {**OPTIONS, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options["num_tokens_range"] = elastic
    whole = trainer(bases("llava_llama"), tmp_path / "whole", conversations(), **options)
    whole.train()
    resumed = trainer(bases("llava_llama"), tmp_path / "resumed", conversations(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
    end, again = snapshot(whole), snapshot(resumed)
    assert all(torch.equal(end[n], again[n]) for n in end)


@pytest.mark.slow
def test_two_processes_have_the_rows_and_losses_of_one(tmp_path):
    place = Place(tmp_path)
    spec = {"model": place.base("llava_llama"), "lora": False}
    args = {"packing": True, "max_length": 70, "gradient_checkpointing": False}
    alone = place.run("one", 1, args={**args, "per_device_train_batch_size": 2}, **spec)[0]
    processes = place.run("two", 2, args={**args, "per_device_train_batch_size": 1}, **spec)
    assert [p["world"] for p in processes] == [2, 2]
    found = [[e["loss"] for e in p["log"]] for p in (alone, processes[0])]
    assert found[1] == pytest.approx(found[0], abs=1e-4) and len(found[0]) == 4
    for key in ("num_tokens", "voco_tokens_per_sample", "compression_ratio"):
        assert [e[key] for e in processes[0]["log"]] == pytest.approx([e[key] for e in alone["log"]]), key


def test_the_card_says_how_rows_were_packed(bases, tmp_path):
    made = trainer(bases("llava_llama"), tmp_path, conversations(), **OPTIONS, max_steps=1)
    made.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "24 rows" in text and f"{len(made.train_dataset)} rows of up to 220 tokens" in text


def test_evaluation_is_not_packed(bases, tmp_path):
    data = conversations()
    made = trainer(bases("llava_llama"), tmp_path, data, eval_dataset=data, **OPTIONS, max_steps=1)
    plain = trainer(bases("llava_llama"), tmp_path, data, eval_dataset=data, max_steps=1)
    assert made.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    assert DOCUMENT_IDS not in next(iter(made.get_eval_dataloader()))
    assert DOCUMENT_IDS in next(iter(made.get_train_dataloader()))


def test_what_cannot_be_packed_is_refused_in_one_line(bases, tmp_path):
    base, data = bases("llava_llama"), conversations()
    cases = [
        ({"max_length": None}, "packing=True needs max_length"),
        ({"voco": None}, r"packing=True needs VoCo on \(voco is None\)"),
        ({"packing_strategy": "wrapped"}, "packing_strategy='wrapped': conversations with images are packed"),
        ({"eval_packing": True}, "eval_packing=True: evaluation with images is not packed"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        (
            {"max_length": 40},
            r"row 2 \(id 'row-2'\) of the data set has 136 tokens, more than max_length=40",
        ),
        ({"data_collator": lambda rows: rows}, "data_collator is a function"),
        ({"data_collator": collator()}, "packing=True needs a max_length, and data_collator has none"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            trainer(base, tmp_path, data, **{**OPTIONS, **options})
        assert "\n" not in str(caught.value)
    stream = data.to_iterable_dataset()
    with pytest.raises(ValueError, match="a streamed data set has no n-th row"):
        trainer(base, tmp_path, stream, **OPTIONS)
    with pytest.raises(ValueError, match="packing needs VoCo on"):
        vp.VoCoDataCollator(processors.processor("llava_llama"))([[conversation(0)]])
