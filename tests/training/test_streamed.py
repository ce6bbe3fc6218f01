"""``stage1: streamed``: loss and gradients of the two stages are those of one pass under the rule, whatever
the batch holds; memory does not grow with the images.
"""

# ruff: noqa: F811  (the fixtures of another test file)

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import voco_plugin as vp
from harness import CORE, attached, inputs, rows_for
from voco_plugin.core.layout import SequenceLayout, TokenKind
from voco_plugin.training.fused_step import FusedStep
from voco_plugin.training.two_stage.layer_checkpointing import can_checkpoint_with_cache
from voco_plugin.training.two_stage.trainer_part import Streamed

ROWS = [
    ["bos", "t3", "img", "c2", "t4"],
    ["bos", "t2", "img", "c2", "t2", "img", "c2", "img", "c2", "t5"],
    ["bos", "t6"],
    ["img", "c2", "img", "c2", "img", "c2", "img", "c2", "img", "c2", "t3"],
]
"""Other numbers of frames, text before, between and after them, none at all, a frame first."""

RULES = {
    "isolated": {},
    "sequential": {"positions": "sequential"},
    "hide-prefix": {"hide_prefix": True},
    "bos-sink": {"block_sink": "bos"},
    "pooled": {"token_init": "pooled"},
    "segmented": {"attention": "segmented"},
}


def fused(model):
    """A forward as TRL's fused one calls the backbone, with the loss of whole logits in the model's dtype."""

    def forward(*, fused_lm_head, labels, **kwargs):
        assert fused_lm_head
        hidden = model.base_model(**{**kwargs, "use_cache": False}).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, :-1])
        return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    return forward


def fused_step(model) -> FusedStep:
    """TRL's part of a training step, with :func:`fused` in its place."""
    can_checkpoint_with_cache(model)
    return FusedStep(lambda model, **batch: fused(model)(**batch))


def everything(model, batch, text_only: bool = False) -> torch.Tensor:
    """Labels of every text token (a text token after a block is predicted by a VoCo token), or of the last
    three.
    """
    layout = SequenceLayout.from_ids(batch["input_ids"], batch["attention_mask"], vp.attachment(model).vocab)
    labels = torch.where(layout.kind == TokenKind.TEXT, batch["input_ids"], -100)
    first = batch["attention_mask"].argmax(dim=1, keepdim=True)
    labels.scatter_(1, first, -100)  # nothing predicts a first token
    if text_only:
        last = batch["attention_mask"].cumsum(1)
        labels = torch.where(last > last.max(dim=1, keepdim=True).values - 3, labels, -100)
    return labels


def both(model, batch, labels, chunk: int = 2):
    """Loss and gradients of the one pass, and of the two stages."""
    found = []
    for streamed in (False, True):
        model.zero_grad()
        forward = fused(model)
        given = {**batch, "labels": labels, "fused_lm_head": True}
        loss = Streamed(chunk, fused_step(model)).run(model, given) if streamed else forward(**given)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((loss.item(), grads))
    return found


def worst(joint, streamed) -> tuple[float, float]:
    """Relative difference of the losses, and the largest of the gradients' (as vectors, per weight)."""
    (loss, one), (other, two) = joint, streamed
    assert math.isfinite(loss) and loss > 0.1
    largest = max(float(g.norm()) for g in one.values() if g is not None)
    errors = [0.0]
    for name, gradient in one.items():
        mine = two[name]
        if gradient is None or mine is None:
            for g in (gradient, mine):
                assert g is None or not g.any(), name
            continue
        # a weight with next to no gradient (a key's bias has none) is as exact as the largest
        errors.append(float((mine - gradient).norm()) / max(float(gradient.norm()), 1e-2 * largest))
    return abs(other - loss) / loss, max(errors)


BOUND = {torch.float32: 1e-5, torch.float64: 1e-9}


def check(name, rule="isolated", dtype=torch.float64, side="right", chunk=2, checkpointing=False, text=False):
    model = attached(name, dtype, **RULES[rule]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs(name, rows_for(rule, ROWS), side, dtype)
    found = worst(*both(model, batch, everything(model, batch, text), chunk))
    # Gemma's norms are computed in fp32 whatever the weights are
    assert max(found) <= (max(BOUND[dtype], 1e-6) if name == "gemma3" else BOUND[dtype]), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CORE)
def test_loss_and_gradients_are_those_of_one_pass(name, dtype):
    check(name, dtype=dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rule", RULES)
def test_so_under_every_option_of_the_rule(rule, side, checkpointing):
    check("llava_llama", rule, side=side, checkpointing=checkpointing)


@pytest.mark.parametrize("name", ["llava_mistral", "qwen2_5_vl", "gemma3", "idefics3", "llava_onevision"])
def test_so_with_layers_checkpointed_and_answers_alone_counted(name):
    # llava_onevision tells the images of one row apart by their row alone: five of them share a chunk
    check(name, side="left", checkpointing=True, text=True, chunk=5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_so_for_every_size_of_a_chunk(chunk):
    check("llava_llama", chunk=chunk, checkpointing=True)


def kept_bytes(frames: int, streamed: bool) -> int:
    """What autograd keeps between a step's forward and its backward."""
    model = attached("llava_llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs("llava_llama", [["bos", "t2", *["img", "c2"] * frames, "t4"]])
    given = {**batch, "labels": everything(model, batch, text_only=True), "fused_lm_head": True}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch.values())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = Streamed(2, fused_step(model)).run(model, given) if streamed else fused(model)(**given)
    assert loss.requires_grad
    return sum(kept.values())


def test_what_is_kept_of_a_frame_is_its_voco_tokens_keys_and_values():
    joint, streamed = ((kept_bytes(12, way) - kept_bytes(4, way)) / 8 for way in (False, True))
    config = attached("llava_llama").config.get_text_config()
    heads = config.num_key_value_heads * config.head_dim
    voco = 2 * 2 * config.num_hidden_layers * heads * 4  # K tokens, keys and values, fp32
    # once as blocks laid out, once more for every query head that shares them; a mask's columns
    assert voco <= streamed <= 6 * voco, (streamed, voco)
    assert joint > 4 * streamed, (joint, streamed)
