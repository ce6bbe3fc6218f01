"""Training with LoRA by stage: what trains, what is saved, loaded and resumed, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

import voco_plugin as vp
from trainers import LORA, losses, trainer
from voco_plugin.cli.eval_modes import plain_model

STAGES = ("compress", "separate")


def voco(stages: str, **options) -> vp.VoCoConfig:
    return vp.VoCoConfig(num_tokens=2, adapter_stages=stages, **options)


@torch.no_grad()
def logits(model, made, data):
    batch = made.data_collator([data[0]])
    batch.pop("labels")
    return model.eval()(**batch).logits


@pytest.fixture(scope="module", params=STAGES)
def run(request, bases, data, tmp_path_factory):
    """A finished run of four steps with a checkpoint after two, its projector trained too."""
    out = tmp_path_factory.mktemp(request.param)
    options = {
        "voco": voco(request.param), "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "train_projector": True,
    }  # fmt: skip
    made = trainer(bases("llava_llama"), out, data, **options)
    made.train()
    made.save_model()
    return request.param, made, out, options


def test_each_adapter_trains(run):
    stages, made, *_ = run
    moved = {n for n, p in made.model.named_parameters() if ".lora_B." in n and p.requires_grad and p.any()}
    names = {"compress": ("default",), "separate": ("compress", "read")}[stages]
    assert all(any(f".{name}." in moved_name for moved_name in moved) for name in names)
    held = [n for n, p in made.model.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert any("trainable_tokens" in n for n in held) and any("projector" in n for n in held)
    assert not any(".read." in n for n in held)


def test_a_checkpoint_loads_as_it_was_trained(run, data):
    stages, made, out, _ = run
    expected = logits(made.model, made, data)
    for folder in (out, out / "checkpoint-4"):
        model, _ = vp.load(str(folder))
        assert vp.attachment(model).config.adapter_stages == stages
        assert torch.equal(logits(model, made, data), expected)
        assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
        assert (folder / "read").is_dir() == (stages == "separate")
    kept, _ = vp.load(str(out), voco=vp.VoCoConfig(num_tokens=1))
    assert vp.attachment(kept).config.adapter_stages == stages
    other = {"compress": "separate", "separate": "compress"}[stages]
    with pytest.raises(ValueError, match=f"was trained with adapter_stages='{stages}', not '{other}'"):
        vp.load(str(out), voco=voco(other))


def test_resumed_it_is_the_same_run(run, bases, data, tmp_path):
    stages, made, out, options = run
    again = trainer(bases("llava_llama"), tmp_path, data, **{**options, "save_strategy": "no"})
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert losses(again) == losses(made)
    assert torch.equal(logits(again.model, again, data), logits(made.model, made, data))
    both = trainer(bases("llava_llama"), tmp_path / "both", data, max_steps=4)
    with pytest.raises(ValueError, match=rf"trained with adapter_stages='{stages}' \(now 'both'\)"):
        both.train(resume_from_checkpoint=str(out / "checkpoint-2"))


def test_the_best_checkpoint_is_loaded_whole(run, bases, data, tmp_path):
    stages, _, _, options = run
    made = trainer(
        bases("llava_llama"), tmp_path, data, **{**options, "more": {"eval_dataset": data}},
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True, learning_rate=1e-1,
    )  # fmt: skip
    made.train()
    best, _ = vp.load(made.state.best_model_checkpoint)
    assert torch.equal(logits(best, made, data), logits(made.model, made, data))


def test_it_trains_on_from_its_folder(run, data, tmp_path):
    stages, made, out, options = run
    more = trainer(str(out), tmp_path, data, peft=False, **{**options, "voco": voco(stages)})
    before = {n: p.clone() for n, p in more.model.named_parameters() if p.requires_grad}
    more.train()
    moved = {n for n, p in more.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any("lora_B" in n for n in moved)
    assert stages == "compress" or any(".read." in n for n in moved)


def test_evaluated_as_its_base_it_is_the_base(run, bases, data):
    """Of ``voco eval --mode base``; PEFT leaves trained copies of modules where an adapter is taken off."""
    _, made, out, _ = run
    plain = plain_model(vp.load(str(out))[0], vp.detach)
    batch = {k: v for k, v in made.data_collator([data[0]]).items() if k != "labels"}
    batch["attention_mask"] = batch["attention_mask"] * (batch["input_ids"] != made._vocab.voco_id)
    base = AutoModelForImageTextToText.from_pretrained(bases("llava_llama")).eval()
    batch["input_ids"] = batch["input_ids"].clamp_max(len(base.get_input_embeddings().weight) - 1)
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, base(**batch).logits)


def test_the_card_says_so(run):
    stages, _, out, _ = run
    card = (out / "README.md").read_text(encoding="utf-8")
    assert {"compress": "text is read with the base model", "separate": "two adapters"}[stages] in card
    assert "never merged" in card
    assert json.loads((out / "voco_config.json").read_text())["voco"]["adapter_stages"] == stages


def test_streamed_and_checkpointed_it_is_the_same_training(bases, data, tmp_path):
    found = []
    for number, options in enumerate(({}, {"stage1": "streamed", "gradient_checkpointing": True})):
        options = {"voco": voco("separate"), "assistant_only_loss": True, **options}
        made = trainer(bases("llava_llama"), tmp_path / str(number), data, **options)
        made.train()
        found.append(losses(made))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_distilled_from_the_base(bases, data, tmp_path):
    made = trainer(bases("llava_llama"), tmp_path, data, voco=voco("compress"), distill={"teacher": "base"})
    made.train()
    assert all(loss > 0 for loss in losses(made))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft": False}, "set use_peft: true"),
        ({"peft": IA3Config(target_modules=["q_proj"], feedforward_modules=[])}, "not IA3; use LoRA"),
        ({"peft": LoraConfig(**LORA, use_dora=True)}, "not DoRA"),
        ({"peft": LoraConfig(**{**LORA, "init_lora_weights": "pissa"})}, "'pissa' changes the weights"),
        ({"peft": LoraConfig(**LORA, bias="all")}, "bias='all' changes the weights"),
        ({"stage1": "frozen", "train_voco": False}, "stage1='frozen' without"),
        ({"train_language": False, "train_vision_tower": True}, "train_language is false; use 'compress'"),
    ],
)
def test_what_cannot_act_by_stage_is_refused_before_training(options, said, bases, data, tmp_path):
    with pytest.raises(ValueError, match=said):
        trainer(bases("llava_llama"), tmp_path, data, voco=voco("separate"), **options)


def test_a_given_adapter_must_fit(bases, data, tmp_path):
    model, processor = vp.load(bases("llava_llama"), voco=voco("separate"))
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    with pytest.raises(ValueError, match="holds default; 'separate' trains the adapters compress and read"):
        trainer(peft, tmp_path, data, peft=False, voco=False, processing_class=processor)
