"""What tests/…/test_frozen.py holds, to be run on broken versions too."""

from __future__ import annotations

import hashlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

import voco_plugin as vp
from contracts.streamed import everything, fused_step
from harness import attached, inputs, layout_of
from voco_plugin.cache import fingerprint as fingerprints
from voco_plugin.store import VoCoCacheStore
from voco_plugin.store.keys import fingerprint_of
from voco_plugin.training.adapters import prepare_peft_config
from voco_plugin.training.two_stage import frozen_blocks
from voco_plugin.training.two_stage.frozen_blocks import IMAGE_KEYS, FrozenBlocks, as_tensor
from voco_plugin.training.two_stage.trainer_part import Frozen

ROWS = [
    ["bos", "t3", "img", "c2", "t4"],
    ["bos", "t2", "img", "c2", "t2", "img", "c2", "img", "c2", "t5"],
    ["bos", "t6"],
    ["img", "c2", "img", "c2", "img", "c2", "t3"],
]


NAMES = ("llava_llama", "llava_tied", "qwen2_5_vl", "gemma3", "idefics3", "llava_next_video", "paligemma")


def tuned(name: str, dtype=torch.float32, zero: bool = False, **options):
    """A model of frozen stage 1, in PEFT; its adapter holds something unless ``zero``."""
    model = attached(name, dtype, frozen_stage1=True, **options)
    peft = get_peft_model(
        model, prepare_peft_config(model, LoraConfig(r=4, lora_alpha=16), None, train_compressor=False)
    )
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in peft.parameters():
            if weight.requires_grad and not zero:
                weight.add_(torch.randn(weight.shape, generator=draw).to(weight) * 0.1)
    return peft


def labelled(model, batch) -> torch.Tensor:
    """Labels ``(B, N)`` of every text token but those that follow an image directly."""
    labels = everything(model, batch)
    for span in layout_of(model, batch).spans:
        if span.stop < labels.shape[1]:
            labels[span.row, span.stop] = -100
    return labels


def by_hand(start, peft, batch, labels) -> torch.Tensor:
    """The loss: compressed by the starting model, a model of its own; read by the trained one."""
    cache = start.compress(**batch)
    stream = start.stream_inputs(batch)
    keep, columns = layout_of(start, batch).in_stream, stream["input_ids"].shape[1]
    told = torch.full_like(stream["input_ids"], -100)
    for row in range(len(told)):
        kept = labels[row, keep[row]]
        told[row, columns - len(kept) :] = kept
    logits = peft.get_base_model()(**stream, voco_cache=cache).logits
    counted = told[:, 1:] != -100
    return cross_entropy(logits[:, :-1][counted], told[:, 1:][counted], reduction="sum")


def step(peft, batch, labels, chunk: int = 2, store=None) -> torch.Tensor:
    inner = peft.get_base_model()
    blocks = FrozenBlocks(fingerprint_of(inner), chunk, store)
    given = {**batch, "labels": labels, "fused_lm_head": True}
    if store is not None:  # the collator's; here an image is known by its place
        layout = layout_of(peft, batch)
        keys = [[f"{row}-{n}" for n in range(len(layout.row_spans(row)))] for row in range(layout.num_rows)]
        given[IMAGE_KEYS] = as_tensor([[hashlib.sha256(k.encode()).hexdigest() for k in row] for row in keys])
    return Frozen(blocks, fused_step(inner)).run(inner, **given)


def gradients(peft, loss) -> dict[str, torch.Tensor]:
    peft.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in peft.named_parameters() if p.requires_grad}


def difference(one, other) -> float:
    """The largest relative difference of the gradients, as ``test_streamed.worst`` measures them."""
    largest = max(float(g.norm()) for g in one.values())
    assert largest > 1e-3
    return max(float((other[n] - g).norm()) / max(float(g.norm()), 1e-2 * largest) for n, g in one.items())


def loss_and_gradients_are_those_of_the_two_steps_by_hand(name, side):
    start, peft = attached(name), tuned(name).train()
    batch = inputs(name, ROWS, side)
    labels = labelled(start, batch)
    loss = step(peft, batch, labels)
    hand = by_hand(start, peft, batch, labels)
    assert loss.item() == pytest.approx(hand.item(), rel=1e-5) and loss.item() > 0.1
    assert difference(gradients(peft, hand), gradients(peft, loss)) <= 1e-5


def its_blocks_are_the_starting_models_and_its_text_is_its_own():
    start, peft = attached("llava_llama"), tuned("llava_llama")
    batch = inputs("llava_llama", ROWS[:1])
    assert peft.compress(**batch).fingerprint == start.compress(**batch).fingerprint == fingerprint_of(peft)
    stream = start.stream_inputs(batch)
    reader = fingerprints.made_by(peft.get_base_model(), vp.attachment(peft))
    assert reader["adapter"] != "none" and reader["frozen_stage1"] is True
    # one way on from text that another model has read is refused, blocks are not
    read = start.prefix_cache(**stream, voco_cache=peft.compress(**batch))
    more = {"input_ids": inputs("llava_llama", [["t3"]])["input_ids"], "prefix_cache": read}
    with pytest.raises(ValueError, match="adapter is"):
        peft.get_base_model()(**more)
    # nor is it read by the same weights and adapter that compress with the adapter on
    mine = peft.prefix_cache(**stream, voco_cache=start.compress(**batch))
    peft.get_base_model()(input_ids=more["input_ids"], prefix_cache=mine)
    vp.attachment(peft).config.frozen_stage1 = False
    with pytest.raises(ValueError, match="frozen_stage1 is True, not False"):
        peft.get_base_model()(input_ids=more["input_ids"], prefix_cache=mine)


def blocks_of_a_store_are_those_computed(name, rule, tmp_path, monkeypatch):
    start, peft = attached(name, **rule), tuned(name, **rule)
    batch = inputs(name, ROWS)
    labels = labelled(start, batch)
    expected = step(peft, batch, labels)
    with VoCoCacheStore.for_model(tmp_path / "store", start) as store:
        assert step(peft, batch, labels, store=store).item() == expected.item()
        assert len(store) == 7
        monkeypatch.setattr(frozen_blocks, "run_alone", lambda *_: pytest.fail("stage 1 was run"))
        loss = step(peft, batch, labels, store=store)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert difference(gradients(peft, expected), gradients(peft, loss)) <= 1e-5
