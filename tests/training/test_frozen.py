"""A model whose stage 1 is frozen compresses as the model it was trained from and reads with its adapter;
loss and gradients of a training batch are those of these two steps done by hand.
"""

from __future__ import annotations

import threading

import pytest
import torch

import voco_plugin as vp
from contracts import frozen
from contracts.frozen import NAMES, ROWS, by_hand, difference, gradients, labelled, step, tuned
from contracts.streamed import everything, fused
from harness import attached, inputs
from voco_plugin.cache.compress import stage_one
from voco_plugin.store import VoCoCacheStore
from voco_plugin.training.two_stage import frozen_blocks


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_two_steps_by_hand(name, side):
    frozen.loss_and_gradients_are_those_of_the_two_steps_by_hand(name, side)


@pytest.mark.parametrize(
    "rule", [{"positions": "sequential"}, {"token_init": "pooled"}, {"attention": "segmented"}]
)
def test_so_under_other_rules_and_with_layers_checkpointed(rule):
    start, peft = (make("llava_llama", torch.float64, **rule) for make in (attached, tuned))
    peft.train().get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs("llava_llama", ROWS, dtype=torch.float64)
    labels = labelled(start, batch)
    loss = step(peft, batch, labels, chunk=100)
    hand = by_hand(start, peft.eval(), batch, labels)  # transformers checkpoints no layer that has a cache
    assert loss.item() == pytest.approx(hand.item(), rel=1e-9)
    assert difference(gradients(peft, hand), gradients(peft, loss)) <= 1e-9


def test_it_differs_from_stage_one_with_the_adapter_on(monkeypatch):
    """The tests above fail where stage 1 runs with the adapter: they would see it."""
    start, peft = attached("llava_llama"), tuned("llava_llama")
    batch = inputs("llava_llama", ROWS)
    labels = labelled(start, batch)
    right = step(peft, batch, labels).item()
    monkeypatch.setattr("voco_plugin.core.adapter_switch.running_forward", lambda: None)
    wrong = step(peft, batch, labels).item()
    assert abs(wrong - right) > 1e-3 * right


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_reads_as_the_starting_model_to_the_bit(name):
    start, peft = attached(name), tuned(name, zero=True)
    batch = inputs(name, ROWS)
    one, other = start.compress(**batch), peft.compress(**batch)
    assert all(
        torch.equal(x, y)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a.keys, b.keys, strict=True)
    )
    stream = start.stream_inputs(batch)
    with torch.no_grad():
        expected = start(**stream, voco_cache=one).logits
        assert torch.equal(
            peft.get_base_model()(**stream, voco_cache=other).logits.nan_to_num(), expected.nan_to_num()
        )
    if name != "paligemma":  # a first step of frozen is that of one pass, where nobody has trained yet
        labels = labelled(start, batch)
        given = {**batch, "labels": labels, "fused_lm_head": True}
        assert step(peft, batch, labels).item() == pytest.approx(fused(start)(**given).item(), rel=1e-5)


def test_its_blocks_are_the_starting_models_and_its_text_is_its_own():
    frozen.its_blocks_are_the_starting_models_and_its_text_is_its_own()


def test_generate_runs_both_stages_and_one_pass_is_refused():
    start, peft = attached("llava_llama"), tuned("llava_llama")
    batch = inputs("llava_llama", ROWS[:2], "left")
    new = {"max_new_tokens": 4, "do_sample": False}
    once = peft.generate(**batch, **new)
    stream = start.stream_inputs(batch)
    twice = peft.generate(**stream, voco_cache=start.compress(**batch), **new)
    assert torch.equal(once[:, -4:], twice[:, -4:])
    for single in (lambda: peft(**batch), lambda: peft.generate(**batch, two_stage=False, **new)):
        with pytest.raises(ValueError, match="which one pass over image and text cannot do"):
            single()
    text = inputs("llava_llama", ROWS[2:3])
    assert torch.isfinite(peft(**text).logits).all()


def test_no_adapter_or_a_merged_one_is_refused():
    batch = inputs("llava_llama", ROWS[:1])
    bare = attached("llava_llama", frozen_stage1=True)
    with pytest.raises(ValueError, match="it has none"):
        bare.compress(**batch)
    peft = tuned("llava_llama")
    peft.merge_adapter()
    with pytest.raises(ValueError, match="merged into its weights"):
        peft.compress(**batch)
    with pytest.raises(ValueError, match="it has none"):
        tuned("llava_llama").merge_and_unload().compress(**batch)


def test_another_thread_reads_with_the_adapter_while_one_compresses(monkeypatch):
    peft = tuned("llava_llama")
    inner = peft.get_base_model()
    batch, text = inputs("llava_llama", ROWS[:1]), inputs("llava_llama", ROWS[2:3])
    with torch.no_grad():
        expected, alone = peft(**text).logits, peft.compress(**batch)
    seen: list[torch.Tensor] = []

    def read() -> None:
        with torch.no_grad():
            seen.append(inner(**text).logits)

    real = stage_one.as_cache

    def meanwhile(cache):  # stage 1 stands just before its forward, its layers open
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        return real(cache)

    monkeypatch.setattr(stage_one, "as_cache", meanwhile)
    again = peft.compress(**batch)
    assert len(seen) == 1 and torch.equal(seen[0], expected)
    assert torch.equal(again[0].blocks[0].keys[0], alone[0].blocks[0].keys[0])
    assert not [n for n, m in inner.named_modules() if "lora" in type(m).__module__ and "forward" in vars(m)]


def test_a_label_right_after_an_image_is_refused():
    peft = tuned("llava_llama")
    batch = inputs("llava_llama", ROWS[:1])
    with pytest.raises(ValueError, match="a label follows an image directly"):
        step(peft, batch, everything(attached("llava_llama"), batch))


@pytest.mark.parametrize("wrong", [{"rule": "star"}, {"block_context": "prefix"}, {"compressor": "avg_pool"}])
def test_a_rule_whose_blocks_are_not_made_alone_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"VoCoConfig.{name}=.* leave {name} out"):
        vp.VoCoConfig(frozen_stage1=True, **wrong)


@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, {}) for name in NAMES if name != "llava_tied"] + [("llava_llama", {"positions": "sequential"})],
)
def test_blocks_of_a_store_are_those_computed(name, rule, tmp_path, monkeypatch):
    frozen.blocks_of_a_store_are_those_computed(name, rule, tmp_path, monkeypatch)


def test_only_what_is_missing_is_computed(tmp_path, monkeypatch):
    start, peft = attached("llava_llama"), tuned("llava_llama")
    ran: list[list[int]] = []
    real = frozen_blocks.run_alone
    monkeypatch.setattr(
        frozen_blocks, "run_alone", lambda b, c, numbers: ran.append(numbers) or real(b, c, numbers)
    )
    with VoCoCacheStore.for_model(tmp_path / "store", start) as store:
        few, all_ = inputs("llava_llama", ROWS[:1]), inputs("llava_llama", ROWS)
        step(peft, few, labelled(start, few), store=store)
        step(peft, all_, labelled(start, all_), store=store, chunk=4)
    assert ran == [[0], [1, 2, 3, 4], [5, 6]]
