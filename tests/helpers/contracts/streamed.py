"""What tests/…/test_streamed.py holds, to be run on broken versions too."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy

import voco_plugin as vp
from harness import attached, inputs, rows_for
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
    "queries": {
        "token_init": "queries",
        "num_tokens": 2,
        "compressor_options": {"hidden_size": 16, "heads": 2},
    },
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
        loss = Streamed(chunk, fused_step(model)).run(model, **given) if streamed else forward(**given)
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
