"""What is done for speed changes nothing of what it speeds up."""

from __future__ import annotations

import pytest
import torch
from trl.trainer import utils
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import tiny
from random_pictures import pictures
from talks import TALK
from tiny.processors import processor
from voco_plugin import VoCoDataCollator
from voco_plugin.training.fused_step import take_off_fused_forward
from voco_plugin.training.trainer import IN_TRLS_LOSS


def test_answers_are_marked_as_transformers_marks_them():
    its = processor("llava_llama")
    rows = [{"messages": TALK, "images": pictures(1)}, {"messages": TALK[:2], "images": pictures(1)}]
    expected = DataCollatorForVisionLanguageModeling(its, assistant_only_loss=True)([dict(r) for r in rows])
    made = VoCoDataCollator(its, assistant_only_loss=True)(rows)
    assert torch.equal(made["labels"], expected["labels"]) and (made["labels"] != -100).any()
    assert "_adjust_assistant_masks_indices" not in vars(its), "the processor is as it was"


def test_the_head_reads_answers_alone_and_loss_and_gradients_stay(monkeypatch):
    its = processor("llava_llama")
    rows = [{"messages": TALK, "images": pictures(1)}, {"messages": TALK[:2], "images": pictures(1)}]
    batch = dict(VoCoDataCollator(its, assistant_only_loss=True)(rows))
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert 0 < labelled < batch["labels"][:, 1:].numel()
    model = tiny.build("llava_llama")
    utils.add_fused_lm_head(model)
    scored = []

    class Spied(utils._ChunkedLogProbFunction):
        @staticmethod
        def forward(ctx, hidden, *more):
            scored.append(len(hidden))
            return utils_function.forward(ctx, hidden, *more)

    utils_function = utils._ChunkedLogProbFunction
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spied)
    before = dict(vars(utils))
    plain = model(**batch, fused_lm_head=True)
    plain.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    step = take_off_fused_forward(model, None, IN_TRLS_LOSS)
    assert "forward" not in vars(model)
    found = step.run(model, **batch, fused_lm_head=True)
    found.loss.backward()
    assert vars(utils) == before, "TRL is as it was"
    assert scored == [batch["labels"][:, 1:].numel(), labelled]
    assert found.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert torch.equal(found.label_mask, plain.label_mask)
    assert (found.log_probs - plain.log_probs).abs().max() < 1e-5
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, grads.pop(name), atol=1e-6, rtol=1e-4), name
    assert not grads
