"""`wrap_collator` puts VoCo tokens into another framework's batch, and guesses nothing of what it holds."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import tiny
import voco_plugin as vp
from tiny import processors

VOCO = vp.VoCoConfig(num_tokens=2, token="<unused0>")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8))


def row(text: str, *seeds: int) -> dict:
    question = [{"type": "image"} for _ in seeds] + [{"type": "text", "text": text}]
    answer = [{"type": "text", "text": f"red {text}"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [picture(seed) for seed in seeds]}


ROWS = [row("what is the color", 1), row("shape"), row("what", 2, 3)]


class Theirs:
    """TRL's collator and what a framework adds per token; `side` is where it pads."""

    def __init__(self, processor, side: str = "right", **more) -> None:
        self.processor, self.side, self.more = processor, side, more
        self.inner = DataCollatorForVisionLanguageModeling(processor)

    def __call__(self, rows: list[dict]) -> dict:
        batch = dict(self.inner([copy.deepcopy(row) for row in rows]))
        if self.side == "left":
            gaps = (batch["attention_mask"] == 0).sum(1).tolist()
            per_token = [
                n for n, v in batch.items() if torch.is_tensor(v) and v.shape == batch["labels"].shape
            ]
            for name in per_token:
                batch[name] = torch.stack([v.roll(gap) for v, gap in zip(batch[name], gaps, strict=True)])
        shape = batch["input_ids"].shape
        return {**batch, **{name: make(*shape) for name, make in self.more.items()}}


def theirs(name: str = "llava_llama", **options) -> Theirs:
    return Theirs(processors.processor(name), **options)


def counting(b: int, t: int) -> torch.Tensor:
    return torch.arange(b * t).reshape(b, t).float()


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3", "internvl", "idefics3"])
def test_a_batch_is_that_of_our_own_collator(name: str) -> None:
    rows = (
        ROWS if name != "llava_llama" else [*ROWS[:2], row("what", 2)]
    )  # LLaVA's has nothing between images
    collator = theirs(name)
    found = vp.wrap_collator(collator, VOCO)(rows)
    expected = vp.VoCoDataCollator(collator.processor, voco=VOCO)([copy.deepcopy(r) for r in rows])
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    voco = found["input_ids"] == collator.processor.tokenizer.convert_tokens_to_ids("<unused0>")
    assert voco.sum() == 2 * sum(len(r["images"]) for r in rows) and bool(
        (found["labels"][voco] == -100).all()
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_stated_tensors_follow_their_tokens(side: str) -> None:
    per_token = {"loss_scale": 0.5, "hidden": -1, "position_ids": None, "not_there": 0}
    collator = theirs(
        side=side, loss_scale=counting, hidden=lambda b, t: counting(b, t)[..., None].expand(b, t, 3).clone(),
        position_ids=lambda b, t: torch.arange(t).expand(3, b, t),
    )  # fmt: skip
    before, found = collator(ROWS[:2]), vp.wrap_collator(collator, VOCO, per_token)(ROWS[:2])
    assert "position_ids" not in found
    voco = found["input_ids"] == collator.processor.tokenizer.convert_tokens_to_ids("<unused0>")
    assert bool((found["loss_scale"][voco] == 0.5).all()) and bool((found["hidden"][voco] == -1).all())
    assert found["hidden"].shape == (*found["input_ids"].shape, 3)
    for number in range(2):
        real, kept = before["attention_mask"][number].bool(), found["attention_mask"][number].bool()
        kept = kept & ~voco[number]
        for key in ("input_ids", "labels", "loss_scale", "hidden"):
            assert torch.equal(found[key][number][kept], before[key][number][real]), key
        padding = ~found["attention_mask"][number].bool()
        assert bool((found["loss_scale"][number][padding] == 0.5).all())
    shorter = found["attention_mask"].sum(1).argmin()
    assert int(found["attention_mask"][shorter, 0 if side == "left" else -1]) == 0


@pytest.mark.parametrize(
    ("more", "per_token", "message"),
    [
        ({"loss_scale": counting}, {}, "'loss_scale', one value per token"),
        ({"image_weight": counting}, {}, "'image_weight', one value per token"),
        ({"weights": lambda b, t: [[1.0] * t] * b}, {}, "'weights', one value per token"),
        ({"position_ids": lambda b, t: torch.zeros(b, t)}, {}, "'position_ids', one value per token"),
        ({"axes": lambda b, t: torch.zeros(3, b, t)}, {}, "'axes', one value per token"),
        ({"states": lambda b, t: torch.zeros(b, t, 4)}, {}, "'states', one value per token"),
        ({"cu_seq_lens_q": lambda b, t: torch.tensor([0, t])}, {}, "turn packing"),
        (
            {"position_ids": lambda b, t: (torch.arange(t) % 7).expand(b, t)}, {"position_ids": None},
            "turn packing",
        ),
        ({"length": lambda b, t: torch.full((b,), t)}, {}, "counts tokens without"),
        ({"loss_scale": lambda b, t: torch.zeros(b)}, {"loss_scale": 0}, "must be a tensor that begins with"),
        ({"weight": lambda b, t: torch.ones(b, t).long()}, {"weight": 0.5}, "give a whole number"),
        ({"input_ids": lambda b, t: [[1] * t] * b}, {}, "must have input_ids as a tensor"),
    ],
)  # fmt: skip
def test_what_is_not_stated_is_refused_by_name(more: dict, per_token: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        vp.wrap_collator(theirs(**more), VOCO, per_token)(ROWS[:2])
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_left_out() -> None:
    more = {
        "length": lambda b, t: torch.full((b,), t),
        "position_ids": lambda b, t: torch.arange(t).expand(b, t),
    }
    found = vp.wrap_collator(theirs(**more), VOCO, {"length": None, "position_ids": None})(ROWS[:2])
    assert not {"length", "position_ids"} & set(found)


def test_it_is_made_of_a_model_too_and_pickles() -> None:
    collator = theirs()
    model = vp.attach(tiny.build("llava_llama"), vp.VoCoConfig(num_tokens=3), collator.processor)
    wrapped = vp.wrap_collator(collator, model)
    found = wrapped(ROWS[:2])
    again = pickle.loads(pickle.dumps(wrapped))
    assert torch.equal(again(ROWS[:2])["input_ids"], found["input_ids"])
    assert len(pickle.dumps(wrapped)) < 200_000, "the model's weights would travel to every worker"
    assert wrapped.side == "right" and wrapped.processor is collator.processor
    loader = torch.utils.data.DataLoader(ROWS[:2], batch_size=2, collate_fn=wrapped, num_workers=1)
    assert torch.equal(next(iter(loader))["labels"], found["labels"])
    twice = vp.wrap_collator(wrapped, model)(ROWS[:2])  # it has its VoCo tokens
    assert torch.equal(twice["input_ids"], found["input_ids"])
    plain = vp.wrap_collator(lambda rows: BatchFeature(collator(rows)), model, num_tokens=1)(ROWS[:2])
    assert type(plain) is BatchFeature
    voco = vp.attachment(model).vocab.voco_id
    assert int((plain["input_ids"] == voco).sum()) == 1 and int((found["input_ids"] == voco).sum()) == 3
    with torch.no_grad():
        assert torch.isfinite(model(**found).loss)


def test_voco_tokens_that_a_collator_has_labelled_are_not_learnt() -> None:
    collator = theirs()
    model = vp.attach(tiny.build("llava_llama"), vp.VoCoConfig(num_tokens=2), collator.processor)
    inserting = vp.VoCoProcessor(collator.processor, model)

    def labels_all(rows: list[dict]) -> dict:
        batch = inserting(images=[picture(1)], text=["<image> what"], return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].clone()}

    found = vp.wrap_collator(labels_all, model)(ROWS)
    voco = found["input_ids"] == vp.attachment(model).vocab.voco_id
    assert int(voco.sum()) == 2 and bool((found["labels"][voco] == -100).all())
    assert bool((found["labels"][~voco] != -100).all())


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(ValueError, match="is no collator"):
        vp.wrap_collator("collator", VOCO)
    with pytest.raises(ValueError, match="'labels' follows the VoCo tokens by itself"):
        vp.wrap_collator(theirs(), VOCO, {"labels": -100})
    with pytest.raises(ValueError, match="'loss_scale' gets 'zero', which is no number"):
        vp.wrap_collator(theirs(), VOCO, {"loss_scale": "zero"})
    with pytest.raises(ValueError, match="give processor=… too"):
        vp.wrap_collator(lambda rows: rows, VOCO)
    with pytest.raises(ValueError, match="gives a list, not a dict"):
        vp.wrap_collator(lambda rows: rows, VOCO, processor=processors.processor("llava_llama"))(ROWS)


def test_images_side_by_side_without_a_marker_are_told_apart_or_refused() -> None:
    processor = processors.processor("llava_llama")

    def side_by_side(rows: list[str]) -> dict:
        images = [picture(n) for n in range(sum(text.count("<image>") for text in rows))]
        return dict(processor(images=images, text=rows, padding=True, return_tensors="pt"))

    wrapped = vp.wrap_collator(side_by_side, VOCO, processor=processor)
    voco = processor.tokenizer.convert_tokens_to_ids("<unused0>")
    assert int((wrapped(["<image><image> what"])["input_ids"] == voco).sum()) == 4
    assert int((wrapped(["<image> a <image> what", "the"])["input_ids"] == voco).sum()) == 4
    with pytest.raises(vp.LayoutError, match="3 images in 2 run"):
        wrapped(["<image><image> what", "<image>"])
