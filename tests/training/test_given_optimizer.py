"""What a caller built on the model before the trainer changed it holds what trains, or is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
import voco_plugin as vp
from harness import attached, inputs, plain, vocabulary
from tiny import processors, voco_id
from trainers import LORA, losses, moved, snapshot, trainer
from voco_plugin.training.given_optimizer import GivenOptimizer

HEAD = "lm_head.weight"


def made_with(model, out, data, optimizers=None, scheduler=None, peft=False, **options):
    given = {} if optimizers is None and scheduler is None else {"optimizers": (optimizers, scheduler)}
    options = {"processing_class": processors.processor("llava_llama"), **options}
    return trainer(model, out, data, peft=peft, lr_scheduler_type="constant", **options, more=given)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


def test_an_optimizer_from_before_attaching_trains_all_that_the_trainers_own_would(data, tmp_path):
    model = tiny.build("llava_llama")
    made = made_with(model, tmp_path / "given", data, adam(model))
    before = snapshot(made)
    made.train()
    trainable = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert HEAD in trainable and moved(before, made) == trainable
    own = made_with(tiny.build("llava_llama"), tmp_path / "own", data)
    own.train()
    assert losses(made) == pytest.approx(losses(own), abs=1e-5)


def test_hooks_and_averages_from_before_attaching_are_the_models_still():
    model = plain("llava_llama")
    head, weight, rows = model.lm_head, model.lm_head.weight, len(model.lm_head.weight)
    seen = []
    head.register_forward_hook(lambda *args: seen.append(args[2].shape[-1]))
    weight.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    vp.attach(model, vp.VoCoConfig(token="<v>"), processors.processor("llava_llama"))
    assert model.lm_head is head and head.weight is weight and len(weight) > rows
    assert head.out_features == len(weight)
    model(input_ids=torch.tensor([[1, 4, 5]])).logits.sum().backward()
    assert seen == [len(weight), tuple(weight.shape)]
    vp.detach(model)
    assert model.lm_head is head and head.weight is weight and len(weight) == rows and weight.grad is None


def test_one_without_the_adapters_that_the_trainer_makes_is_refused(data, tmp_path):
    model = tiny.build("llava_llama")
    with pytest.raises(ValueError, match=r"was made before .* \(and \d+ more\) was, .* optimizer_cls_and_kw"):
        made_with(model, tmp_path, data, adam(model), peft=True)
    assert not vp.is_attached(model) and not hasattr(model, "peft_config")


def test_one_that_has_stepped_on_shorter_matrices_is_refused(data, tmp_path):
    model = tiny.build("llava_llama")
    optimizer = adam(model)
    model(input_ids=torch.tensor([[1, 4, 5]])).logits.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"its state for .*embed_tokens.weight \(and 1 more\) has the shape"):
        made_with(model, tmp_path, data, optimizer)


def test_one_that_holds_a_replaced_tensor_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    given = GivenOptimizer((adam(model), None), model)
    model[1] = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"holds 1\.weight \(and 1 more\), which another tensor has"):
        given.check(model)


@pytest.mark.parametrize("peft", [False, True])
def test_one_made_of_the_model_as_it_trains_is_taken(data, tmp_path, peft, caplog):
    model, processor = tiny.build("llava_llama"), processors.processor("llava_llama")
    vp.attach(model, vp.VoCoConfig(num_tokens=2), processor)
    if peft:
        model = get_peft_model(model, LoraConfig(**{**LORA, "target_modules": r".*language_model.*q_proj"}))
    with caplog.at_level(logging.WARNING, "voco_plugin"):
        made = made_with(
            model, tmp_path, data, adam(model), voco=False, train_voco=not peft, processing_class=processor
        )
    before = snapshot(made)
    made.train()
    assert moved(before, made) == {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert "does not hold" not in caplog.text


def test_one_of_a_part_is_the_callers_choice_and_named(data, tmp_path, caplog):
    model = tiny.build("llava_llama")
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=1e-2)
    with caplog.at_level(logging.WARNING, "voco_plugin"):
        made = made_with(model, tmp_path, data, optimizer)
    assert "the optimizer given does not hold model.language_model." in caplog.text
    before = snapshot(made)
    made.train()
    assert moved(before, made) == {HEAD}


def test_a_class_and_its_arguments_are_filled_in_by_the_trainer(data, tmp_path):
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2})}
    made = trainer(
        tiny.build("llava_llama"), tmp_path, data, more=given,
        processing_class=processors.processor("llava_llama"),
    )  # fmt: skip
    before = snapshot(made)
    made.train()
    assert moved(before, made)


@pytest.mark.parametrize("beside", [False, True])
def test_a_scheduler_of_another_optimizer_is_refused(data, tmp_path, beside):
    model = tiny.build("llava_llama")
    scheduler = torch.optim.lr_scheduler.ConstantLR(adam(model))
    with pytest.raises(ValueError, match="the scheduler is that of a AdamW, and (none|another) is given"):
        made_with(model, tmp_path, data, adam(model) if beside else None, scheduler)


@pytest.mark.parametrize(
    "place",
    ["layers", *(pytest.param(p, marks=pytest.mark.slow) for p in ("around", "whole", "backbone"))],
)
@torch.no_grad()
def test_a_compiled_model_that_ran_before_runs_under_the_rule_after(place):
    """What was traced without the rule is not used again, nor the other way round."""
    name = "llava_llama"
    batch, model = inputs(name), plain(name)
    whole = torch.compile(model, backend="eager") if place == "around" else model
    parts = {"whole": [model], "backbone": [model.model], "layers": model.model.language_model.layers}
    for part in parts.get(place, []):
        part.compile(backend="eager")
    before = whole(**batch).logits
    options = vp.VoCoConfig(token_id=voco_id(name))
    vp.attach(whole, options, vocabulary=vocabulary(name, model, options))
    assert torch.equal(whole(**batch).logits, attached(name)(**batch).logits)
    assert not torch.equal(whole(**batch).logits, before)
    vp.detach(whole)
    assert torch.equal(whole(**batch).logits, before)
