"""Compressors under the trainer: what trains, and that checkpoints hold it and runs resume with it."""

from __future__ import annotations

import logging

import pytest
import torch

import trainers as shared
import voco_plugin as vp
from compressor_kinds import KINDS, voco

ANSWERS = {"assistant_only_loss": True}


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_the_compressor_beside_its_adapters(kind, bases, data, tmp_path):
    made = shared.trainer(bases("llava_llama"), tmp_path, data, voco=voco(kind), max_steps=2, **ANSWERS)
    before = shared.snapshot(made)
    made.train()
    moved = shared.moved(before, made)
    copied = {n for n in before if "voco_compressor.modules_to_save" in n and before[n].is_floating_point()}
    adapters = {n for n in before if "lora_" in n}
    row = {n for n in before if "trainable_tokens_delta" in n}
    # what a softmax does not see: a bias on all keys alike
    still = {n for n in copied if n.endswith("key.bias")}
    assert moved - still == (adapters | row | copied) - still
    assert bool(row) == (KINDS[kind].get("compressor", "voco") == "voco"), "a rival's tokens have no row"
    assert bool(copied) == (kind not in ("matryoshka",))
    trained = sum(before[n].numel() for n in copied)
    assert (f"compressor {trained:,}" in made.trainable_report) == bool(copied)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["pooled", "slots", "queries", "qformer"])
def test_a_checkpoint_loads_by_its_path_and_a_run_resumes(kind, peft, bases, data, tmp_path, monkeypatch):
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    options = {"peft": peft, "voco": voco(kind), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = shared.trainer(bases("llava_llama"), tmp_path / "whole", data, **options)
    whole.train()
    resumed = shared.trainer(bases("llava_llama"), tmp_path / "resumed", data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert shared.losses(resumed) == shared.losses(whole)
    batch = whole.data_collator([data[0], data[1], data[5]])
    whole.model.eval()
    model, _ = vp.load(tmp_path / "whole" / "checkpoint-4")
    with torch.no_grad():
        expected = whole.model(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
    weights = [p for n, p in model.named_parameters() if "voco_compressor" in n and "original" not in n]
    assert weights and all(bool(w.abs().max() > 0) for w in weights if w.dim() > 1)
    fewer, _ = vp.load(tmp_path / "whole" / "checkpoint-4", voco={**voco(kind).to_dict(), "num_tokens": 1})
    assert vp.attachment(fewer).config.num_tokens == 1
    with torch.no_grad():  # the K of the batch counts, the weights are those of the K it was trained with
        assert torch.equal(fewer(**batch).logits, expected)
    assert not [line for line in said if "voco_compressor" in line]
    if not peft:  # plain transformers reads the same checkpoint
        from transformers import AutoModelForImageTextToText

        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole" / "checkpoint-4")
        assert torch.equal(plain.lm_head.weight, model.lm_head.weight)


def test_full_training_moves_the_compressor_only_if_asked(bases, data, tmp_path):
    for train_voco in (True, False):
        made = shared.trainer(
            bases("llava_llama"), tmp_path, data, peft=False, voco=voco("avg_pool"), max_steps=1,
            train_voco=train_voco,
        )  # fmt: skip
        before = shared.snapshot(made)
        made.train()
        assert any("voco_compressor" in n for n in shared.moved(before, made)) == train_voco


def test_elastic_k_under_pooled_tokens(bases, data, tmp_path):
    made = shared.trainer(
        bases("llava_llama"), tmp_path, data, voco=voco("pooled"), num_tokens_range=[1, 4], max_steps=4
    )
    made.train()
    assert len(set(e["voco_tokens_per_sample"] for e in made.state.log_history if "loss" in e)) > 1


def test_an_adapter_goes_with_its_own_compressor(bases, data, tmp_path):
    made = shared.trainer(bases("llava_llama"), tmp_path, data, voco=voco("pooled"), max_steps=1)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="token_init='pooled'; leave voco out"):
        vp.load(tmp_path / "saved", voco=vp.VoCoConfig(num_tokens=2))


def test_questions_without_labels_on_answers_alone_are_refused(bases, data, tmp_path):
    made = shared.trainer(bases("llava_llama"), tmp_path, data, voco=voco("llama_vid"), max_steps=1)
    with pytest.raises(ValueError, match="assistant_only_loss"):
        made.train()
