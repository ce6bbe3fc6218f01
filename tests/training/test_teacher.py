"""The teacher is the model before VoCo, bit for bit, and leaves no trace on a model that it shares."""

# ruff: noqa: F811  (the fixtures of other test files)

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
import voco_plugin as vp
from harness import attached, inputs, plain, shared
from tiny import processors
from voco_plugin.core.attachment import unwrap
from voco_plugin.core.forward import UNTOUCHED, active_rule
from voco_plugin.core.injection import insert_voco_tokens, remove_voco_tokens
from voco_plugin.training.distillation import teacher
from voco_plugin.training.distillation.divergence import Head
from voco_plugin.training.distillation.step import observe_head, plain_prompts
from voco_plugin.training.distillation.teacher import BaseTeacher, load_teacher

LORA = LoraConfig(
    r=4, target_modules="all-linear", init_lora_weights=False, trainable_token_indices=[5], lora_dropout=0.5
)


def without_voco(name, batch):
    vocab = vp.attachment(shared(name)).vocab
    side = "left" if bool((batch["attention_mask"][:, 0] == 0).any()) else "right"
    return remove_voco_tokens(batch, vocab, pad_token_id=tiny.PAD, padding_side=side)


@torch.no_grad()
def suspended_logits(model, batch):
    return model(**batch, voco_mode=UNTOUCHED).logits


# -- the rule is lifted
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.NAMES)
def test_suspended_is_the_model_that_was_never_attached(name):
    """Difference 0.0, on prompts without VoCo tokens, which the rule refuses."""
    batch = without_voco(name, inputs(name))
    model = shared(name)
    with torch.no_grad():
        expected = plain(name)(**batch).logits
    assert torch.equal(suspended_logits(model, batch), expected)
    with pytest.raises(ValueError, match="no VoCo tokens after them"):
        model(**batch)


@pytest.mark.parametrize("attention", ["auto", "segmented", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_suspended_under_every_backend_and_padding(attention, side):
    batch = without_voco("qwen2_5_vl", inputs("qwen2_5_vl", side=side))
    with torch.no_grad():
        expected = plain("qwen2_5_vl")(**batch).logits
    assert torch.equal(suspended_logits(shared("qwen2_5_vl", attention=attention), batch), expected)


@pytest.mark.parametrize("options", [{"token_init": "pooled"}, {"compressor": "avg_pool"}])
def test_suspended_makes_no_embeddings(options):
    """A stream that still holds VoCo tokens is read as ordinary text, whatever writes their embeddings."""
    model, batch = attached("llava_llama", **options), inputs("llava_llama")
    for weight in model.voco_compressor.parameters():
        torch.nn.init.normal_(weight, std=1.0)
    with torch.no_grad():
        expected = plain("llava_llama")(**batch).logits
    assert torch.equal(suspended_logits(model, batch), expected)
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, expected)


def test_the_rule_is_back_afterwards_also_after_an_error():
    model, batch = shared("llava_llama"), inputs("llava_llama")
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.raises(ValueError):
            model(**{**batch, "pixel_values": torch.zeros(2, 3)}, voco_mode=UNTOUCHED)
        assert torch.equal(model(**batch).logits, expected) and active_rule() is None
        assert not torch.equal(suspended_logits(model, batch), expected)
        assert torch.equal(model(**batch).logits, expected)


def test_another_thread_keeps_the_rule():
    model, batch, seen = shared("llava_llama"), inputs("llava_llama"), []
    with torch.no_grad():
        expected = model(**batch).logits

        def run():
            with torch.no_grad():
                seen.append(model(**batch).logits)

        def meanwhile(module, args):
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()

        handle = model.get_decoder().layers[0].register_forward_pre_hook(meanwhile)
        try:
            suspended_logits(model, batch)
        finally:
            handle.remove()
    assert torch.equal(seen[0], expected)


# -- prompts without VoCo tokens
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["isolated", "bos-sink"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "internvl", "gemma3", "idefics3"])
def test_taking_voco_tokens_out_undoes_putting_them_in(name, side, rule):
    vocab = vp.attachment(shared(name, rule=rule)).vocab
    whole = inputs(name, side=side)
    batch = without_voco(name, whole)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    shape = {"pad_token_id": tiny.PAD, "padding_side": side}
    spans = vp.SequenceLayout.from_ids(
        whole["input_ids"], whole["attention_mask"], replace(vocab, bos_id=None)
    )
    images = [sum(span.row == row for span in spans) for row in range(len(whole["input_ids"]))]
    put_in = insert_voco_tokens(batch, vocab, 3, images_per_row=images, **shape)
    assert put_in["input_ids"].shape[1] > batch["input_ids"].shape[1]
    before = {k: v.clone() for k, v in put_in.items() if isinstance(v, torch.Tensor)}
    back = remove_voco_tokens(put_in, vocab, **shape)
    assert set(back) == set(batch)
    for key, value in batch.items():
        assert torch.equal(back[key], value) if isinstance(value, torch.Tensor) else back[key] is value, key
    assert all(torch.equal(put_in[k], v) for k, v in before.items()), "the batch was mutated"


@pytest.mark.parametrize("name", processors.NAMES)
def test_the_teachers_prompts_are_those_of_the_plain_collator(name, data):
    rows = [data[i] for i in (0, 1, 5)]
    processor = processors.processor(name)
    voco = vp.VoCoConfig(num_tokens=3, token="<unused0>")
    batch = vp.VoCoDataCollator(processor, voco=voco)(rows)
    expected = vp.VoCoDataCollator(processor, voco=None)(rows)
    vocab = vp.VoCoDataCollator(processor, voco=voco).vocab
    found = plain_prompts(batch, vocab)
    real = expected["attention_mask"].bool()
    for key, value in found.items():
        assert value.shape == expected[key].shape
        assert torch.equal(value[real], expected[key][real]), key
    assert set(found) == {k for k, v in expected.items() if v.shape == expected["input_ids"].shape}
    kept = plain_prompts(batch, vocab, keep_voco=True)
    assert torch.equal(kept["input_ids"], batch["input_ids"])


def test_packed_prompts_are_taken_apart(data):
    rows = [data[i] for i in (0, 1, 5, 2)]
    processor = processors.processor("llava_llama")
    collate = vp.VoCoDataCollator(processor, voco=vp.VoCoConfig(num_tokens=3, token="<unused0>"))
    alone, packed = collate(rows), collate([rows[:2], rows[2:]])
    found, expected = (plain_prompts(b, collate.vocab) for b in (packed, alone))
    real = expected["attention_mask"].bool()
    for key in ("input_ids", "attention_mask", "labels"):
        # alone, a row's first token keeps its label, which nothing reads
        a, b = (x[key][:, 1:] if key == "labels" else x[key] for x in (found, expected))
        assert torch.equal(a[real[:, -a.shape[1] :]], b[real[:, -a.shape[1] :]]), key


# -- heads
# ------------------------------------------------------------------------------------------------------------


NOT_AS_CONFIGURED = {
    "llava_gemma2": {"scaled": True, "capped": False},
    "aya_vision": {"scaled": False, "capped": True},
    "cohere2_vision": {"scaled": False, "capped": True},
}
"""What these classes of transformers 5.23 leave out."""


@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_are_read_off_the_hidden_states_as_the_model_makes_them(name, caplog):
    model, batch = shared(name), inputs(name)
    if model.base_model is model:
        pytest.skip(f"{name} has no backbone of its own: the trainer refuses it")
    how = observe_head(model, vp.attachment(model).vocab)
    configured = {"scaled": True, "capped": True}
    if name in NOT_AS_CONFIGURED:
        assert how == NOT_AS_CONFIGURED[name]
    assert ("does not apply the logit scale or soft cap" in caplog.text) == (how != configured)
    with torch.no_grad():
        found = Head.of(model, **how).logits(model.base_model(**batch).last_hidden_state.flatten(0, 1))
        expected = model(**batch).logits.flatten(0, 1)
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_head_that_does_more_is_refused(monkeypatch):
    model = attached("llava_llama")
    own = type(model).forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        with pytest.raises(ValueError, match="LlavaForConditionalGeneration does more .* leave distill out"):
            observe_head(model, vp.attachment(model).vocab)
    observe_head(model, vp.attachment(model).vocab)


# -- a shared model
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def student():
    model = get_peft_model(attached("llava_llama"), LORA).train()
    for layer in unwrap(model).get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:  # as after training: nothing is what it was
                weight.add_(torch.randn_like(weight))
    return model


def test_the_base_teacher_is_the_original_model(student):
    batch = without_voco("llava_llama", inputs("llava_llama"))
    with torch.no_grad():
        expected = plain("llava_llama").base_model(**batch).last_hidden_state
        logits = plain("llava_llama")(**batch).logits
    output, head = BaseTeacher(student).read(batch)
    assert torch.equal(output.last_hidden_state, expected) and not output.last_hidden_state.requires_grad
    found = head.logits(output.last_hidden_state.flatten(0, 1)).view_as(logits)
    assert float((found - logits).abs().max()) <= 1e-5


def test_the_base_teacher_leaves_no_trace(student):
    frozen = [n for n, p in student.named_parameters() if "lora_A" in n]
    for name, weight in student.named_parameters():
        if name in frozen:
            weight.requires_grad_(False)
    odd = next(m for n, m in student.named_modules() if n.endswith("vision_tower"))
    odd.eval()
    before = {n: (p.requires_grad, p.detach().clone(), p.grad) for n, p in student.named_parameters()}
    modes = {n: m.training for n, m in student.named_modules()}
    state = torch.get_rng_state()
    BaseTeacher(student).read(without_voco("llava_llama", inputs("llava_llama")))
    assert torch.equal(torch.get_rng_state(), state), "dropout was drawn"
    assert {n: m.training for n, m in student.named_modules()} == modes
    for name, weight in student.named_parameters():
        trains, value, grad = before[name]
        assert weight.requires_grad == trains and weight.grad is grad and torch.equal(weight, value), name
    with pytest.raises(ValueError):
        BaseTeacher(student).read({"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.zeros(2)})
    assert {n: m.training for n, m in student.named_modules()} == modes
    assert {n: p.requires_grad for n, p in student.named_parameters()} == {
        n: trains for n, (trains, _, _) in before.items()
    }
    assert student.get_model_status().enabled is not False


# -- other checkpoints
# ------------------------------------------------------------------------------------------------------------


def config(source, **more):
    return vp.DistillConfig(teacher=str(source), **more)


@pytest.fixture
def loaded(bases):
    model, processor = vp.load(bases("llava_llama"), voco=vp.VoCoConfig(num_tokens=2))
    return model, processor


def changed(bases, tmp_path, change):
    """A checkpoint that differs in one thing."""
    from transformers import AutoProcessor

    model, processor = tiny.build("llava_llama"), AutoProcessor.from_pretrained(bases("llava_llama"))
    change(model, processor)
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def teach(loaded, source, **more):
    model, processor = loaded
    return load_teacher(model, processor, vp.attachment(model).vocab, config(source, **more), False)


def test_a_checkpoint_teaches_as_it_is(loaded, bases):
    other = teach(loaded, bases("llava_llama"))
    assert not vp.is_attached(other)
    batch = without_voco("llava_llama", inputs("llava_llama"))
    with torch.no_grad():
        expected = plain("llava_llama").base_model(**batch).last_hidden_state
    made = teacher.OtherTeacher(other)
    output, _ = made.read(batch)
    assert torch.equal(output.last_hidden_state, expected)
    assert not any(p.requires_grad for p in other.parameters()) and made.rows is None


def test_a_voco_model_teaches_without_its_rule(loaded, bases, tmp_path):
    model, processor = vp.load(bases("llava_llama"), voco=vp.VoCoConfig(num_tokens=2, rule="causal"))
    model.save_pretrained(tmp_path / "upper")
    other = teach(loaded, tmp_path / "upper", teacher_tokens=True)
    batch = inputs("llava_llama")
    batch["input_ids"][batch["input_ids"] == tiny.voco_id("llava_llama")] = vp.attachment(other).vocab.voco_id
    with torch.no_grad():
        expected = model.base_model(**batch).last_hidden_state
    output, _ = teacher.OtherTeacher(other).read(batch)
    assert torch.equal(output.last_hidden_state, expected)


@pytest.mark.parametrize(
    ("change", "more", "why"),
    [
        (lambda m, p: p.tokenizer.add_tokens(["<extra>"]), {}, "has another tokenizer: '<extra>' is id"),
        (lambda m, p: None, {"teacher_tokens": True}, "'<voco>' is no token there and id"),
        (
            lambda m, p: setattr(p.image_processor, "image_mean", [0.1, 0.2, 0.3]),
            {},
            r"prepares images another way: image_mean=\[0.1, 0.2, 0.3\]",
        ),
    ],
)
def test_a_checkpoint_that_cannot_read_the_batches_is_refused(loaded, bases, tmp_path, change, more, why):
    with pytest.raises(ValueError, match=why) as caught:
        teach(loaded, changed(bases, tmp_path, change), **more)
    assert "\n" not in str(caught.value)


def test_another_family_and_a_missing_folder_are_refused(loaded, bases, tmp_path):
    with pytest.raises(ValueError, match="is a qwen2_5_vl model and the student a llava one"):
        teach(loaded, bases("qwen2_5_vl"))
    with pytest.raises(FileNotFoundError, match=r"distill.teacher='.*gone' does not exist"):
        teach(loaded, tmp_path / "gone")


def test_a_teacher_with_a_compressor_reads_no_voco_tokens(loaded, bases, tmp_path):
    pooled = vp.VoCoConfig(num_tokens=2, token_init="pooled")
    model, processor = vp.load(bases("llava_llama"), voco=pooled)
    model.save_pretrained(tmp_path / "pooled")
    with pytest.raises(ValueError, match="with a compressor, and a teacher reads without one"):
        teach(loaded, tmp_path / "pooled", teacher_tokens=True)
    assert vp.is_attached(teach(loaded, tmp_path / "pooled"))


# -- the tests can fail
# ------------------------------------------------------------------------------------------------------------


def never(patch):
    patch.setattr(teacher, "adapters_off", lambda model: contextlib.nullcontext())


BROKEN = {
    "the adapter stays on": (never, test_the_base_teacher_is_the_original_model),
    "dropout stays on": (
        lambda patch: patch.setattr(teacher, "evaluating", lambda model: contextlib.nullcontext()),
        test_the_base_teacher_leaves_no_trace,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_tests_notice(name, student, monkeypatch):
    break_it, run = BROKEN[name]
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        run(student)
