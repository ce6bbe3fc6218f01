"""A model whose stage 1 is frozen compresses as the model it was trained from and reads with its adapter;
loss and gradients of a training batch are those of these two steps done by hand.
"""

from __future__ import annotations

import hashlib
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_streamed import everything, fused, fused_step
from torch.nn.functional import cross_entropy

import voco_plugin as vp
from harness import attached, inputs, layout_of
from voco_plugin.cache.compress import stage_one
from voco_plugin.cache.place import stage_two
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
    return Frozen(blocks, fused_step(inner)).run(inner, given)


def gradients(peft, loss) -> dict[str, torch.Tensor]:
    peft.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in peft.named_parameters() if p.requires_grad}


def difference(one, other) -> float:
    """The largest relative difference of the gradients, as ``test_streamed.worst`` measures them."""
    largest = max(float(g.norm()) for g in one.values())
    assert largest > 1e-3
    return max(float((other[n] - g).norm()) / max(float(g.norm()), 1e-2 * largest) for n, g in one.items())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_two_steps_by_hand(name, side):
    start, peft = attached(name), tuned(name).train()
    batch = inputs(name, ROWS, side)
    labels = labelled(start, batch)
    loss = step(peft, batch, labels)
    hand = by_hand(start, peft, batch, labels)
    assert loss.item() == pytest.approx(hand.item(), rel=1e-5) and loss.item() > 0.1
    assert difference(gradients(peft, hand), gradients(peft, loss)) <= 1e-5


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
    start, peft = attached("llava_llama"), tuned("llava_llama")
    batch = inputs("llava_llama", ROWS[:1])
    assert peft.compress(**batch).fingerprint == start.compress(**batch).fingerprint == fingerprint_of(peft)
    stream = start.stream_inputs(batch)
    reader = stage_two.made_by(peft.get_base_model(), vp.attachment(peft))
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
