"""Training with ``distill``: the loss and its gradient are the textbook's, however the batch is cut up."""

# ruff: noqa: F811  (the fixtures of other test files)

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer
from peft.tuners.lora.config import KasaConfig
from transformers import HfArgumentParser

import conversations as packing
import tiny
import voco_plugin as vp
from compressor_kinds import voco as compressor
from textbook import plain
from tiny import processors
from trainers import snapshot, trainer
from voco_plugin.cli import eval_modes, main
from voco_plugin.core.attachment import unwrap
from voco_plugin.core.forward import ONE_PASS
from voco_plugin.training.distillation import step as lesson
from voco_plugin.training.distillation.trainer_part import Distilling, copy_of_student

ROWS = (0, 1, 5, 2)  # answers of one, two, two and two words; the third has no image
ANSWERS = {"assistant_only_loss": True}
ALL = {"teacher": "frozen", "weight": 2.0, "temperature": 2.0, "hidden_weight": 0.1}
TERMS = ("loss", "ce_loss", "distill_loss", "hidden_loss")


def entries(made) -> list[dict]:
    return [entry for entry in made.state.log_history if "loss" in entry]


def shaken(made) -> None:
    """Every trainable weight moved, as if it had trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.1)


def student_logits(made, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    output = made.model(**inputs, output_hidden_states=True)
    mask = batch["labels"][:, 1:] != -100
    return output.logits[:, :-1][mask], batch["labels"][:, 1:][mask], output, mask


def teacher_logits(name, rows, dtype, made):
    """The never-attached model on the plain collator's batch."""
    model = tiny.build(name).to(dtype).eval()
    collator = vp.VoCoDataCollator(
        processors.processor(name), voco=None, assistant_only_loss=True, chat_template=made.chat_template
    )
    batch = collator(rows)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    mask = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        output = model(**inputs, output_hidden_states=True)
    return output.logits[:, :-1][mask], output, mask


def distilled(made, batch):
    """The loss of one batch and the gradients of all that trains."""
    made.model.zero_grad()
    count = (batch["labels"][:, 1:] != -100).sum() if made.model_accepts_loss_kwargs else None
    made.current_gradient_accumulation_steps = 1
    loss = made.compute_loss(made.model, batch, num_items_in_batch=count)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in made.model.named_parameters() if p.requires_grad}


def reference(made, batch, name, rows, dtype):
    """The same from whole logits of both models, in a few lines."""
    config = made.args.distill
    made.model.zero_grad()
    s, labels, own, at = student_logits(made, batch)
    t, its, there = teacher_logits(name, rows, dtype, made)
    state = vp.attachment(made.model)
    columns = [i for i in range(t.shape[1]) if i != state.vocab.voco_id]  # what both know
    s_known, t_known = s[:, columns], t[:, columns]
    kl = plain(s_known, t_known, config.divergence, config.temperature).mean()
    loss = config.ce_weight * torch.nn.functional.cross_entropy(s, labels)
    loss = loss + config.weight * config.temperature**2 * kl
    if config.hidden_weight:
        layers = config.hidden_layers or [len(own.hidden_states) - 1]
        for n in layers:
            a, b = own.hidden_states[n][:, :-1][at], its.hidden_states[n][:, :-1][there]
            error = (a - b).square().mean(-1) / b.square().mean(-1)
            loss = loss + config.hidden_weight * error.mean() / len(layers)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in made.model.named_parameters() if p.requires_grad}


def compared(name, bases, data, out, peft, dtype, **options):
    """Largest difference of the losses, and of the gradients relative to the largest one."""
    made = trainer(
        bases(name), out, data, peft=peft, distill=options, model_init_kwargs={"dtype": dtype}, **ANSWERS
    )
    shaken(made)
    made.model.train()
    rows = [data[i] for i in ROWS]
    batch = made.data_collator(rows)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    loss, found = distilled(made, dict(batch))
    expected_loss, expected = reference(made, batch, name, rows, dtype)
    assert float(expected_loss.abs()) > 1e-2
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert largest > 1e-4
    worst = 0.0
    for key, gradient in expected.items():
        mine = found[key]
        if gradient is None or mine is None:
            assert mine is None or not mine.any(), key
            assert gradient is None or not gradient.any(), key
            continue
        worst = max(worst, float((mine - gradient).abs().max()) / largest)
    return abs(float(loss - expected_loss)), worst


WAYS = [
    {},
    {"divergence": "reverse", "temperature": 2.0},
    {"divergence": "jsd", "chunk": 2},
    {"weight": 0.5, "temperature": 0.7, "hidden_weight": 0.3},
    {"weight": 0.0, "hidden_weight": 1.0, "hidden_layers": [0, 1]},
]


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("options", WAYS)
def test_the_gradient_is_that_of_whole_logits_in_fp64(bases, data, tmp_path, peft, options):
    """TRL's own loss is computed in fp32 whatever the weights are, so it is left out here."""
    teacher = "base" if peft else "frozen"
    found = compared(
        "llava_llama", bases, data, tmp_path, peft, torch.float64, teacher=teacher, ce_weight=0.0, **options
    )
    assert max(found) <= 1e-9, found


@pytest.mark.parametrize(
    "name", ["llava_llama", "llava_tied", "qwen2_5_vl", "internvl", "gemma3", "idefics3"]
)
@pytest.mark.parametrize("peft", [True, False])
def test_the_loss_is_the_ordinary_one_and_the_divergence(bases, data, tmp_path, name, peft):
    teacher = "base" if peft else "frozen"
    found = compared(name, bases, data, tmp_path, peft, torch.float32, teacher=teacher)
    assert max(found) <= 1e-5, found


def test_a_checkpoint_teaches_the_same(bases, data, tmp_path):
    teacher = bases("llava_llama")
    found = compared(
        "llava_llama", bases, data, tmp_path, True, torch.float64, teacher=teacher, ce_weight=0.0
    )
    assert max(found) <= 1e-9, found


@pytest.mark.parametrize("attention", ["segmented", "auto"])
@pytest.mark.parametrize("rule", ["isolated", "star", "causal"])
def test_under_every_rule_and_backend_the_terms_are_finite_and_teach(bases, data, tmp_path, rule, attention):
    voco = vp.VoCoConfig(num_tokens=2, rule=rule, attention=attention)
    made = trainer(bases("llava_llama"), tmp_path, data, voco=voco, distill={"ce_weight": 0.0}, max_steps=8)
    made.train()
    found = [e["distill_loss"] for e in entries(made)]
    assert all(0 < x < 50 for x in found)


# -- however the batch is cut up
# ------------------------------------------------------------------------------------------------------------


def one_step(bases, data, out, name="llava_llama", **options):
    """Losses and weights after one SGD step at learning rate 1: the gradient itself."""
    given = {"distill": ALL}
    rows = data.select([*ROWS, 3, 4, 6, 7])
    made = trainer(
        bases(name), out, rows, peft=False, **{**given, **ANSWERS, **options},
        optim="sgd", learning_rate=1e-2, max_grad_norm=0.0, lr_scheduler_type="constant", max_steps=1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    before = snapshot(made)
    made.train()
    after = snapshot(made)
    return entries(made)[0], {n: after[n] - before[n] for n in before}


def same_step(a, b, tolerance=1e-6):
    for key in TERMS:
        assert a[0][key] == pytest.approx(b[0][key], rel=1e-5), key
    moved = 0.0
    for name, delta in a[1].items():
        moved = max(moved, float(delta.abs().max()))
        assert float((delta - b[1][name]).abs().max()) <= tolerance, name
    assert moved > 1e-3


def test_accumulation_steps_have_the_gradient_of_one_batch(bases, data, tmp_path):
    whole = one_step(bases, data, tmp_path, per_device_train_batch_size=4)
    for size, steps in ((1, 4), (2, 2)):
        cut = one_step(
            bases, data, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        same_step(whole, cut)


def test_a_family_that_takes_no_count_is_averaged_as_its_ordinary_loss_is(bases, data, tmp_path):
    """Qwen2.5-VL: Trainer counts no tokens for it, and TRL takes the mean of each micro-batch."""
    rows, name = data.select([*ROWS, 3, 4, 6, 7]), "qwen2_5_vl"
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    entry, _ = one_step(bases, data, tmp_path, name, **options)
    made = trainer(bases(name), tmp_path, rows, peft=False, distill=ALL, **ANSWERS)
    assert not made.model_accepts_loss_kwargs
    made.model.train()
    for n in range(4):  # no optimizer step in between: the terms are summed up
        distilled(made, made.data_collator([rows[n]]))
    for key, total in made._sums.items():
        assert entry[key] == pytest.approx(float(total) / 4, rel=1e-5), key
    assert set(made._sums) == set(TERMS) - {"loss"}


def test_gradient_checkpointing_changes_nothing(bases, data, tmp_path):
    plainly = one_step(bases, data, tmp_path)
    for reentrant in (False, True):
        again = one_step(
            bases, data, tmp_path, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        same_step(plainly, again)


def test_chunks_change_nothing(bases, data, tmp_path):
    once = one_step(bases, data, tmp_path, distill={**ALL, "chunk": 1})
    same_step(one_step(bases, data, tmp_path), once)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_packed_rows_have_the_terms_of_the_same_conversations_unpacked(name, bases, tmp_path):
    options = {**packing.OPTIONS, "distill": {"weight": 1.0, "hidden_weight": 0.5}, "max_steps": 2}
    made = trainer(bases(name), tmp_path / "packed", packing.conversations(), **options)
    other = trainer(bases(name), tmp_path / "plain", packing.conversations(), **options)
    given = other.data_collator
    other.data_collator = packing.Unpacked(given.processor, voco=given.voco, vocab=given.vocab)
    made.train()
    other.train()
    for a, b in zip(entries(made), entries(other), strict=True):
        for key in TERMS:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


# -- a run
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_log_adds_up(bases, data, tmp_path, accumulation):
    given = {"weight": 0.7, "ce_weight": 0.4, "temperature": 2.0, "hidden_weight": 0.2}
    made = trainer(
        bases("llava_llama"), tmp_path, data, distill=given, logging_steps=2, max_steps=5,
        gradient_accumulation_steps=accumulation, eval_dataset=data.select([0, 1]), eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    made.train()
    logged = entries(made)
    assert len(logged) == 2
    for entry in logged:
        total = 0.4 * entry["ce_loss"] + 0.7 * entry["distill_loss"] + 0.2 * entry["hidden_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert all("distill_loss" not in e and "eval_distill_loss" not in e for e in made.state.log_history if
               "loss" not in e)  # fmt: skip


def test_evaluation_keeps_the_ordinary_loss(bases, data, tmp_path):
    found = []
    for distill in (None, {"weight": 5.0}):
        made = trainer(bases("llava_llama"), tmp_path, data, eval_dataset=data, distill=distill)
        found.append(made.evaluate()["eval_loss"])
    assert found[0] == found[1]


@pytest.mark.parametrize(("peft", "teacher"), [(True, "base"), (False, "frozen")])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(bases, data, tmp_path, peft, teacher):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "distill": {"teacher": teacher}}
    whole = trainer(bases("llava_llama"), tmp_path / "whole", data, peft=peft, **options)
    whole.train()
    resumed = trainer(bases("llava_llama"), tmp_path / "resumed", data, peft=peft, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for key in ("loss", "ce_loss", "distill_loss"):
        found, expected = ([e[key] for e in entries(made)] for made in (resumed, whole))
        assert found == expected and len(found) == 6, key
    ends = snapshot(whole), snapshot(resumed)
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize(("peft", "teacher"), [(True, "base"), (False, "frozen"), (True, "frozen")])
def test_the_teacher_is_untouched_and_the_checkpoint_holds_none(bases, data, tmp_path, peft, teacher):
    made = trainer(bases("llava_llama"), tmp_path, data, peft=peft, distill={"teacher": teacher}, max_steps=3)
    model = made._distiller.teacher.model
    frozen = {n: p for n, p in model.named_parameters() if teacher == "frozen" or not p.requires_grad}
    before = {n: p.detach().clone() for n, p in frozen.items()}
    trained = {n for n, p in made.model.named_parameters() if p.requires_grad}
    made.train()
    for name, weight in frozen.items():
        assert weight.grad is None and torch.equal(weight, before[name]), name
    assert {n for n, p in made.model.named_parameters() if p.requires_grad} == trained
    made.save_model(str(tmp_path / "saved"))
    size = sum(p.stat().st_size for p in (tmp_path / "saved").glob("*.safetensors"))
    other = trainer(bases("llava_llama"), tmp_path, data, peft=peft, max_steps=1)
    other.save_model(str(tmp_path / "other"))
    assert size == sum(p.stat().st_size for p in (tmp_path / "other").glob("*.safetensors"))
    batch = made._eval_collator([data[0]])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    made.model.eval()
    assert unwrap(made.model).generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_the_divergence_alone_pulls_the_student_to_the_teacher(bases, data, tmp_path):
    """Training on Eq. 1 alone, without one label's loss: the divergence falls by more than half."""
    made = trainer(
        bases("llava_llama"), tmp_path, data, distill={"ce_weight": 0.0}, max_steps=40, learning_rate=3e-3,
        per_device_train_batch_size=8,
    )  # fmt: skip
    made.train()
    found = [e["distill_loss"] for e in entries(made)]
    assert found[-1] < found[0] / 2, found


@pytest.mark.parametrize("kind", ["pooled", "slots", "qformer", "llama_vid"])
def test_compressors_are_taught_by_the_plain_model(bases, data, tmp_path, kind):
    made = trainer(
        bases("llava_llama"), tmp_path, data, voco=compressor(kind), distill={}, max_steps=2, **ANSWERS
    )
    shaken(made)
    rows = [data[i] for i in ROWS]
    batch = made.data_collator(rows)
    made.model.train()
    made_lesson = made._distiller.lesson(batch)
    vision = {k: v for k, v in batch.items() if k == "pixel_values"}
    inputs = {k: v for k, v in made_lesson.prompts.items() if k != "labels"}
    output, _ = made._distiller.teacher.read({**inputs, **vision})
    expected, its, _ = teacher_logits("llava_llama", rows, torch.float32, made)
    assert torch.equal(output.last_hidden_state, its.hidden_states[-1])
    made.train()
    assert all(e["distill_loss"] > 0 for e in entries(made))


@pytest.mark.parametrize("name", ["llava_llama", "llava_qwen2", "llava_tied", "qwen2_5_vl"])
def test_the_base_teachers_logits_are_those_of_the_untouched_model(bases, data, tmp_path, name):
    """Difference 0.0, in every row of the vocabulary but the VoCo token's, added or made of a spare one."""
    made = trainer(bases(name), tmp_path, data, distill={}, **ANSWERS)
    shaken(made)
    rows = [data[i] for i in ROWS]
    batch = made.data_collator(rows)
    vision = {k: v for k, v in batch.items() if k.startswith(("pixel", "image"))}
    found = made._distiller.lesson(batch)
    inputs = {k: v for k, v in found.prompts.items() if k != "labels"}
    output, head = made._distiller.teacher.read({**inputs, **vision})
    mask = lesson.before_answers(found.prompts["labels"])
    logits = head.logits(output.last_hidden_state[:, :-1][mask])
    expected, _, _ = teacher_logits(name, rows, torch.float32, made)
    voco = vp.attachment(made.model).vocab.voco_id
    columns = [i for i in range(expected.shape[1]) if i != voco]
    assert torch.equal(logits[:, columns], expected[:, columns])
    assert made._distiller.comparison.rows in (None, expected.shape[1])


REWRITES = [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": KasaConfig()},
]  # fmt: skip


@pytest.mark.parametrize("init", REWRITES, ids=lambda init: next(iter(init)))
def test_an_adapter_that_rewrites_its_base_has_no_base_to_teach(bases, data, tmp_path, init):
    """Made here or given: PEFT's switch leaves the changed weights; a copy from before teaches."""
    peft = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **init)
    with pytest.raises(ValueError, match=f"'base' switches the adapter off, and {next(iter(init))}"):
        trainer(bases("llava_llama"), tmp_path, data, peft=peft, distill={}, **ANSWERS)
    if init != REWRITES[0]:
        return
    model = get_peft_model(vp.load(bases("llava_llama"))[0], peft)
    with pytest.raises(ValueError, match="and init_lora_weights='pissa' has changed the weights"):
        trainer(model, tmp_path, data, peft=False, voco=False, distill={}, train_voco=False)
    with pytest.raises(ValueError, match="so what is left is not the base model"):
        eval_modes.plain_model(model, vp.detach)
    trainer(bases("llava_llama"), tmp_path, data, peft=peft, distill={"teacher": "frozen"}, **ANSWERS)


def test_a_method_unknown_here_is_caught_by_what_it_wrote(bases, data, tmp_path, monkeypatch):
    stock = layer.LoraLayer.reset_lora_parameters

    def rewrite(self, adapter_name, *args):
        stock(self, adapter_name, *args)
        self.get_base_layer().weight.data = self.get_base_layer().weight.data * 1.01

    monkeypatch.setattr(layer.LoraLayer, "reset_lora_parameters", rewrite)
    with pytest.raises(ValueError, match=r"making it has changed the weights under it \(model\..*proj"):
        trainer(bases("llava_llama"), tmp_path, data, distill={}, **ANSWERS)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_alone_have_one(bases, data, tmp_path, init):
    peft = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=init)
    trainer(bases("llava_llama"), tmp_path, data, peft=peft, distill={}, **ANSWERS)


def test_a_row_that_trains_alone_needs_no_adapter(bases, data, tmp_path):
    options = {"peft": False, "train_language": False}
    made = trainer(bases("llava_llama"), tmp_path, data, distill={}, **options)
    made.train()
    assert all(e["distill_loss"] > 0 for e in entries(made))
    with pytest.raises(ValueError, match="the model's own weights train"):
        trainer(bases("llava_llama"), tmp_path, data, distill={"teacher_tokens": True}, **options)


def test_elastic_k_is_taught(bases, data, tmp_path):
    made = trainer(bases("llava_llama"), tmp_path, data, distill={}, num_tokens_range=[1, 4], max_steps=4)
    made.train()
    assert len({e["voco_tokens_per_sample"] for e in entries(made)}) > 1
    assert all(e["distill_loss"] > 0 for e in entries(made))


def test_bf16_weights_are_taught_in_fp32_divergences(bases, data, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        made = trainer(
            bases("llava_llama"), tmp_path, data, distill={}, max_steps=1, model_init_kwargs={"dtype": dtype}
        )
        made.train()
        found[dtype] = entries(made)[0]["distill_loss"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)


def test_a_run_goes_on_where_no_answer_is_labelled(bases, data, tmp_path):
    """A micro-batch without a label: its terms are zero, and the step counts the others."""
    made = trainer(bases("llava_llama"), tmp_path, data, distill={"hidden_weight": 1.0}, **ANSWERS)
    batch = made.data_collator([data[0]])
    batch["labels"][:] = -100
    made.model.train()
    loss, gradients = distilled(made, batch)
    assert float(loss) == 0.0 and not any(g is not None and g.any() for g in gradients.values())


# -- what is refused
# ------------------------------------------------------------------------------------------------------------


def test_what_distillation_cannot_do_is_refused_in_one_line(bases, data, tmp_path):
    base = bases("llava_llama")
    cases = [
        ({"peft": False, "distill": {}}, "needs an adapter to switch off, and the model's own weights train"),
        ({"voco": False, "distill": {}}, "voco is null, so there is nothing to compress"),
        ({"distill": {}, "label_smoothing_factor": 0.1}, "label_smoothing_factor needs whole logits"),
        ({"distill": {"weight": 0}}, "both 0, so nothing is distilled"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            trainer(base, tmp_path, data, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match="image_newline trains in place beside it; set distill.teacher to frozen"
    ):
        trainer(bases("llava_onevision"), tmp_path, data, distill={}, train_projector=True)
    with pytest.raises(ValueError, match="packed rows of this family keep the images of a row together"):
        trainer(bases("idefics3"), tmp_path, packing.conversations(), distill={}, **packing.OPTIONS)
    made = trainer(base, tmp_path, data, distill={"hidden_weight": 1.0, "hidden_layers": [7]})
    with pytest.raises(ValueError, match=r"hidden_layers=\[7\]: .* has hidden states 0 to 2"):
        made.train()
    biased = LoraConfig(r=4, target_modules="all-linear", bias="all")
    with pytest.raises(ValueError, match="trains in place beside it"):
        args = vp.VoCoSFTConfig(str(tmp_path), voco=vp.VoCoConfig(), distill={}, report_to=[])
        vp.VoCoSFTTrainer(bases("llava_qwen2"), args=args, train_dataset=data, peft_config=biased)


def test_a_frozen_copy_of_split_weights_is_refused(bases):
    """As ZeRO-3 leaves a parameter: it has a `ds_id`."""
    model, _ = vp.load(bases("llava_llama"))
    config = vp.DistillConfig(teacher="frozen")
    copied = copy_of_student(config, model)
    assert copied is not model and vp.is_attached(copied) and copy_of_student(None, model) is None
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=f"loaded from: --distill.teacher {bases('llava_llama')}"):
        copy_of_student(config, model)


def test_bf16_autocast_trains(bases, data, tmp_path):
    found = {}
    for bf16 in (False, True):
        made = trainer(
            bases("llava_llama"),
            tmp_path,
            data,
            peft=False,
            distill=ALL,
            bf16=bf16,
            use_cpu=True,
            max_steps=2,
        )
        made.train()
        found[bf16] = [e["distill_loss"] for e in entries(made)]
    assert found[True] == pytest.approx(found[False], rel=0.1) and found[True] != found[False]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"weigth": 2}, r"no field 'weigth' \(did you mean 'weight'\?\)"),
        ({"weight": -1}, "weight=-1 must be a number of at least 0"),
        ({"weight": "much"}, "weight='much' must be a number"),
        ({"weight": True}, "weight=True must be a number"),
        ({"weight": float("nan")}, "weight=nan must be a number"),
        ({"temperature": 0}, "temperature=0 must be a number above 0"),
        ({"divergence": "foward"}, r"divergence='foward' is not known \(did you mean 'forward'\?\)"),
        ({"top_k": 0}, "top_k=0 must be an integer of at least 1, or null for every token"),
        ({"chunk": 1.5}, "chunk=1.5 must be an integer of at least 1"),
        ({"chunk": None}, "chunk=None must be an integer"),
        ({"teacher": "bsae"}, r"teacher='bsae' is not known \(did you mean 'base'\?\) and no folder"),
        ({"teacher": ""}, "teacher='' must be base, frozen or a checkpoint"),
        ({"teacher_tokens": 1}, "teacher_tokens=1 must be true or false"),
        ({"hidden_layers": [1]}, "without hidden_weight changes nothing"),
        ({"hidden_layers": [-1], "hidden_weight": 1.0}, "must list numbers of layers from 0"),
        (3, "distill=3 must be a DistillConfig"),
        ("{", "is not JSON"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(values, why, tmp_path):
    with pytest.raises(ValueError, match=why) as caught:
        vp.VoCoSFTConfig(str(tmp_path), distill=values)
    assert "\n" not in str(caught.value)


def test_the_config_survives_json_the_parser_and_a_copy(tmp_path):
    config = vp.VoCoSFTConfig(str(tmp_path), distill=vp.DistillConfig(top_k=8, teacher="frozen"))
    values = json.loads(config.to_json_string())
    assert values["distill"]["top_k"] == 8
    assert vp.VoCoSFTConfig(**{**values, "hub_token": None}).distill == config.distill
    line = ["--output_dir", str(tmp_path)]
    parse = HfArgumentParser(vp.VoCoSFTConfig).parse_args_into_dataclasses
    assert parse([*line, "--distill", '{"top_k": 8, "teacher": "frozen"}'])[0].distill == config.distill
    assert parse(line)[0].distill is None and parse([*line, "--distill", "none"])[0].distill is None
    assert vp.VoCoSFTConfig(str(tmp_path)).distill is None


# -- the command line
# ------------------------------------------------------------------------------------------------------------


def recipe(bases, recipe_data, tmp_path, **more):
    values = {
        "model_name_or_path": bases("llava_llama"), "dataset_name": str(recipe_data), "use_cpu": True,
        "image_folder": str(recipe_data.parent), "voco": {"num_tokens": 2},
        "output_dir": str(tmp_path / "run"), "max_steps": 2, "disable_tqdm": True,
        "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "bf16": False, "use_peft": True, "lora_r": 4,
        "assistant_only_loss": True, "lora_target_modules": "all-linear", **more,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "r.yaml")


def test_a_recipe_with_distill_trains_two_steps(bases, recipe_data, tmp_path, capsys):
    path = recipe(bases, recipe_data, tmp_path, distill={"teacher": "base", "weight": 2.0})
    assert main(["train", path, "--distill.weight", "0.5", "--distill.top_k", "20"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    logged = [e for e in state["log_history"] if "loss" in e]
    assert len(logged) == 2
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + 0.5 * entry["distill_loss"], rel=1e-5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "teacher=base, weight=0.5, top_k=20" in card


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("--distill.weigth 1", "distill: DistillConfig has no field 'weigth' (did you mean 'weight'?)"),
        ("--distill.weight much", "distill: weight='much' is a text, and weight takes a number"),
        ("--distill 3", "distill=3 must be a section of DistillConfig's fields, or null"),
        ("--distill.divergence forwards", "did you mean 'forward'?"),
    ],
)
def test_a_wrong_section_is_one_line_before_anything_loads(
    bases, recipe_data, tmp_path, capsys, override, why
):
    path = recipe(bases, recipe_data, tmp_path)
    assert main(["train", path, *override.split()]) == 2
    said = capsys.readouterr().err
    assert why in said and len(said.strip().splitlines()) == 1


# -- the tests can fail
# ------------------------------------------------------------------------------------------------------------


def own_count(self, output, num_items_in_batch):
    return output.label_mask.sum().clamp(min=1)


def voco_stays(patch):
    real = lesson.plain_prompts
    patch.setattr(lesson, "plain_prompts", lambda batch, vocab, keep_voco=False: real(batch, vocab, True))


def unshifted(labels):
    mask = labels != -100
    return mask[:, :-1]


def fp64(peft):
    def run(bases, data, out):
        test_the_gradient_is_that_of_whole_logits_in_fp64(bases, data, out, peft, {})

    return run


BROKEN = {
    "each micro-batch counts its own tokens": (
        lambda patch: patch.setattr(Distilling, "_counted", own_count),
        test_accumulation_steps_have_the_gradient_of_one_batch,
    ),
    "the teacher reads VoCo tokens": (voco_stays, fp64(True)),
    "labels are not shifted": (lambda patch: patch.setattr(lesson, "before_answers", unshifted), fp64(False)),
    "the rule stays in force": (
        lambda patch: patch.setattr("voco_plugin.training.distillation.teacher.UNTOUCHED", ONE_PASS),
        fp64(False),
    ),
    "the log counts micro-batches": (
        lambda patch: patch.setattr(
            Distilling, "_sums_from", property(lambda s: s.state.global_step - 6, lambda s, v: None), False
        ),
        lambda bases, data, out: test_the_log_adds_up(bases, data, out, 3),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_tests_notice(name, bases, data, tmp_path, monkeypatch):
    break_it, run = BROKEN[name]
    break_it(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        run(bases, data, tmp_path)
