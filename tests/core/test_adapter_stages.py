"""LoRA by stage: blocks are compressed with the adapter, text is read with the base (or another adapter), in
one pass as in two stages, whatever runs the forward.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

import voco_plugin as vp
from contracts.stages import STAGES, based, furthest, gradients, moves, staged, targets
from contracts.streamed import both, everything
from harness import ROWS, inputs, text_columns
from matrix import combined
from measure import two_stage
from packed import COUNTS, LONG, packed_inputs
from tiny import NAMES, voco_id
from tiny.wide import BACKBONES
from voco_plugin.core.adapter_stages import act_by_stage
from voco_plugin.core.packed_rows import DOCUMENT_IDS

QUICK = ("llava_llama", "llava_tied", "qwen2_5_vl", "gemma3", "idefics3", "llava_deepseek", "llama4")


@pytest.mark.parametrize(
    ("name", "stages"), combined([(n, s) for n in NAMES for s in STAGES], lambda n, s: n in QUICK)
)
def test_two_stage_equals_single_pass(name, stages):
    model = staged(name, stages)
    image, text = moves(model, name)
    assert image > 1e-2 and (text == 0) == (stages == "compress")
    assert two_stage(model, name) <= 1e-4


@pytest.mark.parametrize(
    ("name", "stages"),
    combined([(n, s) for n in NAMES for s in STAGES], lambda n, s: n in ("llava_llama", "qwen2_5_vl")),
)
def test_so_in_fp64(name, stages):
    loose = name in BACKBONES and BACKBONES[name].loose_fp64
    model = staged(name, stages, torch.float64)
    assert two_stage(model, name, torch.float64) <= (1e-5 if loose else 1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"block_context": "prefix"}, {"rule": "star"}, {"positions": "sequential"}, {"hide_prefix": True},
        {"attention": "segmented"}, {"attention": "dense", "attn": "eager"}, {"token_init": "pooled"},
        {"compressor": "avg_pool"},
    ],
)  # fmt: skip
def test_so_under_other_rules_and_kernels(options):
    assert two_stage(staged("llava_llama", "separate", **options), "llava_llama") <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["segmented", pytest.param("flex", marks=pytest.mark.slow)])
def test_every_backend_gives_the_same(kind):
    batch = inputs("llava_llama", ROWS, "left")
    dense, other = (
        staged("llava_llama", "separate", attention=name)(**batch).logits for name in ("dense", kind)
    )
    real = batch["attention_mask"].bool()
    assert (other[real] - dense[real]).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_llama", "gemma3", "qwen2_5_vl"])
def test_text_is_read_with_the_base_to_the_bit(name):
    model, base = staged(name, "compress"), based(name)
    batch = inputs(name, [["bos", "t6"], ["t3"]])
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    batch = inputs(name, ROWS, "left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    ours, theirs = (m(**stream, voco_cache=cache).logits for m in (model, base))
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    ask = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 3, "pad_token_id": 0}
    assert torch.equal(
        model.generate(**stream, voco_cache=cache, **ask), base.generate(**stream, voco_cache=cache, **ask)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_of_two_adapters_each_acts_on_its_own_tokens(name):
    """One that adds nothing leaves its stage to the base."""
    batch, text = inputs(name, ROWS, "left"), inputs(name, [["bos", "t6"]])
    for silent in ("compress", "read"):
        model = staged(name, "separate")
        for weight_name, weight in model.named_parameters():
            if f".lora_B.{silent}." in weight_name:
                weight.zero_()
        cache = model.compress(**batch)
        with model.disable_adapter():
            base, plain = model.compress(**batch), model(**text).logits
        same = all(torch.equal(a.keys[-1], b.keys[-1]) for a, b in zip(cache, base, strict=True))
        assert same == (silent == "compress")
        assert torch.equal(model(**text).logits, plain) == (silent == "read")
        assert two_stage(model, name) <= 1e-4


@torch.no_grad()
def test_the_row_of_a_tied_head_moves_the_voco_tokens_own_logit_and_no_other():
    for name, moved in (("llava_tied", [voco_id("llava_tied")]), ("llava_llama", [])):
        model, base = staged(name, "compress", row=True), based(name)
        batch = inputs(name, [["bos", "t6"]])
        different = (model(**batch).logits != base(**batch).logits).any(dim=1)[0]
        assert different.nonzero().flatten().tolist() == moved


@torch.no_grad()
@pytest.mark.parametrize("stages", STAGES)
def test_batched_equals_one_by_one(stages):
    model = staged("qwen2_5_vl", stages)
    batch = inputs("qwen2_5_vl", ROWS, "left")
    logits, columns = model(**batch).logits, text_columns(model, batch)
    for row in range(len(ROWS)):
        alone = inputs("qwen2_5_vl", [ROWS[row]], first_row=row)
        own = text_columns(model, alone)[0]
        assert (logits[row, columns[row]] - model(**alone).logits[0, own]).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("stages", STAGES)
def test_generating_in_one_pass_and_in_two_gives_the_same(stages):
    model = staged("llava_llama", stages)
    batch = inputs("llava_llama", ROWS, "left")
    ask = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 3, "pad_token_id": 0}
    one, two = (model.generate(**batch, two_stage=how, **ask)[:, -6:] for how in (False, True))
    assert torch.equal(one, two)
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    static = model.generate(**stream, voco_cache=cache, cache_implementation="static", **ask)[:, -6:]
    assert torch.equal(static, two)


@torch.no_grad()
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_packed_is_as_alone(name, stages):
    model = staged(name, stages)
    batch, packed = packed_inputs(model, name, LONG, COUNTS)
    alone, side = model(**batch).logits, model(**packed).logits
    ids, row = packed[DOCUMENT_IDS], 0
    for place in range(len(ids)):
        for number in range(1, int(ids[place].max()) + 1):
            real = batch["attention_mask"][row].bool()
            assert (side[place, ids[place] == number] - alone[row, real]).abs().max() <= 1e-4
            row += 1
    assert row == len(LONG)


# -- gradients


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("name", "stages"), [("llava_llama", "compress"), ("qwen2_5_vl", "separate")])
def test_gradient_checkpointing_changes_no_gradient(name, stages, reentrant):
    model = staged(name, stages).train()
    batch = inputs(name, ROWS)
    labels = everything(model, batch)
    plain = gradients(model, batch, labels)
    inner = model.get_base_model()
    inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inner.enable_input_require_grads()
    assert furthest(plain, gradients(model, batch, labels)) <= 1e-5


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
def test_nor_in_any_family(name):
    test_gradient_checkpointing_changes_no_gradient(name, "separate", False)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("name", "stages"), [("llava_llama", "compress"), ("qwen2_5_vl", "separate")])
def test_streamed_training_has_the_gradients_of_one_pass(name, stages, checkpointed):
    model = staged(name, stages, torch.float64).train().get_base_model()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs(name, ROWS, dtype=torch.float64)
    (one, own), (two, other) = both(model, batch, everything(model, batch))
    assert one == pytest.approx(two, rel=1e-9)
    assert furthest(own, other) <= 1e-9


def test_a_batch_of_text_has_gradients_of_zero():
    """Not none: processes that train together wait for each other's."""
    model = staged("llava_llama", "compress").train()
    batch = inputs("llava_llama", [["bos", "t6"]])
    model.get_base_model().enable_input_require_grads()
    found = gradients(model, batch, batch["input_ids"])
    assert all(grad is not None and not grad.any() for grad in found.values()) and found


# -- the model as an object


@torch.no_grad()
def test_copies_act_by_stage_and_a_detached_model_does_not():
    model = staged("llava_llama", "compress")
    act_by_stage(model.get_base_model(), "compress", voco_id("llava_llama"))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    batch = inputs("llava_llama", ROWS)
    expected = model(**batch).logits
    for parameter in model.parameters():
        parameter.zero_()
    assert all(torch.equal(copied(**batch).logits, expected) for copied in copies)
    vp.detach(copies[0].get_base_model())
    assert not any("_voco_extension" in vars(type(module)) for module in copies[0].modules())


def test_it_is_never_merged():
    model = staged("llava_llama", "compress", row=True)
    batch = inputs("llava_llama", ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match="merged into the weights it would act on all of them"):
                merge()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(**batch).logits, expected)
        plain = model.unload()
        assert torch.equal(plain(**inputs("llava_llama", [["t5"]])).logits, based("llava_llama")(
            **inputs("llava_llama", [["t5"]])).logits)  # fmt: skip


# -- what is refused


def adapted(config, stages="compress", **options):
    model = based("llava_llama", stages=stages, **options)
    return get_peft_model(model, config(model))


REFUSED = {
    "dora": (lambda m: LoraConfig(target_modules=targets(m), use_dora=True), "DoRA"),
    "pissa": (lambda m: LoraConfig(target_modules=targets(m), init_lora_weights="pissa"), "'pissa' changes"),
    "bias": (lambda m: LoraConfig(target_modules=targets(m), bias="all"), "bias='all' changes"),
    "ia3": (lambda m: IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "only LoRA acts"),
    "head": (lambda m: LoraConfig(target_modules=["q_proj", "lm_head"]), "on the head, which reads text"),
    "copied head": (
        lambda m: LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "modules_to_save copies .*embed_tokens, which reads text",
    ),
    "embeddings": (lambda m: LoraConfig(target_modules=["q_proj", "embed_tokens"]), "is a Embedding"),
    "rows": (
        lambda m: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, voco_id("llava_llama")]),
        "rows of tokens 5 of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_act_by_stage_is_refused(case):
    config, said = REFUSED[case]
    model = adapted(config)
    batch = inputs("llava_llama", ROWS[:1])
    with pytest.raises(ValueError, match=said):
        model(**batch)


def test_latent_attention_and_experts_are_refused_by_name():
    model = based("llava_deepseek")
    peft = get_peft_model(model, LoraConfig(target_modules=["kv_b_proj"]))
    with pytest.raises(ValueError, match=r"kv_b_proj is applied to what a KV cache holds.*leave it out"):
        peft(**inputs("llava_deepseek", ROWS[:1]))


def test_separate_runs_its_two_adapters_and_no_other():
    batch = inputs("llava_llama", ROWS[:1])
    model = adapted(lambda m: LoraConfig(target_modules=targets(m)), "separate")
    with pytest.raises(ValueError, match="compress for images and read for text, and default is active"):
        model(**batch)
    model = staged("llava_llama", "separate")
    model.base_model.set_adapter("compress")
    with pytest.raises(ValueError, match="and compress is active"):
        model(**batch)


def test_images_are_not_compressed_without_the_adapter():
    base, batch = based("llava_llama"), inputs("llava_llama", ROWS[:1])
    for call in (base, base.compress):
        with pytest.raises(ValueError, match="an adapter compresses images, and this model has none"):
            call(**batch)


def test_a_layer_that_runs_outside_the_models_forward_is_refused():
    model = staged("llava_llama", "compress")
    model(**inputs("llava_llama", ROWS[:1]))
    inner = model.get_base_model().get_decoder()
    with pytest.raises(ValueError, match="outside the forward of the attached model"):
        inner(inputs_embeds=torch.zeros(1, 3, inner.config.hidden_size))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"adapter_stages": "read"}, "use one of both, compress, separate"),
        ({"adapter_stages": "compress", "rule": "causal"}, "one stage alone"),
        ({"adapter_stages": "separate", "frozen_stage1": True}, "compresses without"),
    ],
)
def test_configs_that_contradict_themselves(more, said):
    with pytest.raises(ValueError, match=said):
        vp.VoCoConfig(**more)
