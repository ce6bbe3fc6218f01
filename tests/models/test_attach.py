"""Contract 4 (untouched when absent), the token's rows, refusals, and the rule under wrappers."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch

import voco_plugin as vp
from contracts import attaching
from contracts.attaching import equal_bits, state_bits
from harness import attached, inputs, plain, text_columns, vocabulary
from tiny import NAMES, voco_id
from tiny.processors import processor
from voco_plugin.core.layout import LayoutError

TEXT_ONLY = [["bos", "t6"], ["bos", "t3"]]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_batch_without_images_runs_as_the_plain_backbone(name, attn):
    batch = inputs(name, TEXT_ONLY, "left")
    expected = plain(name, attn=attn)(**batch)
    got = attached(name, attn=attn)(**batch)
    assert torch.equal(expected.logits, got.logits)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_detach_gives_back_the_model_bit_for_bit(name):
    model = plain(name)
    implementation = model.get_decoder().config._attn_implementation
    before, config, cls = state_bits(model), copy.deepcopy(model.config.to_dict()), type(model)
    batch = inputs(name, [["bos", "t3", "img", "t4"]])
    expected = model(**batch).logits
    options = vp.VoCoConfig(token_id=voco_id(name))
    vp.attach(model, options, vocabulary=vocabulary(name, model, options))
    assert type(model) is not cls and type(model).__name__ == cls.__name__ and vp.is_attached(model)
    vp.detach(model)
    assert type(model) is cls and not vp.is_attached(model) and not hasattr(model, "compress")
    assert equal_bits(before, state_bits(model)) and model.config.to_dict() == config
    assert torch.equal(model(**batch).logits, expected)
    assert model.get_decoder().config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["llava_llama", "llava_qwen2", "llava_tied", "qwen2_5_vl", "gemma3"])
def test_the_token_is_added_and_taken_back(name):
    attaching.the_token_is_added_and_taken_back(name)


def test_the_row_is_seeded():
    rows = []
    for seed in (0, 0, 1):
        model = plain("llava_llama")
        vp.attach(model, vp.VoCoConfig(token="<v>", token_seed=seed), processor("llava_llama"))
        rows.append(model.get_input_embeddings().weight[vp.attachment(model).vocab.voco_id].detach().clone())
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_importing_changes_nothing():
    code = (
        "import transformers, sys; from transformers import AttentionInterface as A, AttentionMaskInterface "
        "as M\n"
        "before = (dict(A._global_mapping), dict(M._global_mapping))\n"
        "import voco_plugin; voco_plugin.attach; voco_plugin.VoCoCache; voco_plugin.load\n"
        "assert before == (dict(A._global_mapping), dict(M._global_mapping))\n"
        "assert not {'trl', 'timm', 'open_clip', 'datasets', 'peft'} & set(sys.modules), set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_the_rule_holds_for_the_backbone_alone():
    """A fused loss calls the module below the head: the rule must be in force there too."""
    model = attached("llava_llama")
    batch = inputs("llava_llama")
    expected = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model.base_model(**batch).last_hidden_state, expected)


@torch.no_grad()
def test_the_rule_is_lifted_when_the_forward_raises():
    model = attached("llava_llama")
    batch = inputs("llava_llama")
    with pytest.raises(ValueError, match="(?i)image"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    text = inputs("llava_llama", TEXT_ONLY)
    assert torch.equal(model(**text).logits, plain("llava_llama")(**text).logits)


@torch.no_grad()
def test_two_attached_models_do_not_mix():
    first, second = attached("llava_llama"), attached("llava_llama", rule="star")
    batch = inputs("llava_llama")
    alone = first(**batch).logits
    other = second(**batch).logits
    assert torch.equal(first(**batch).logits, alone) and not torch.equal(alone, other)


@torch.no_grad()
def test_a_deep_copy_is_attached_by_itself():
    model = attached("llava_llama")
    batch = inputs("llava_llama")
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    vp.detach(model)
    assert vp.is_attached(twin) and torch.equal(twin(**batch).logits, expected)
    assert len(twin.compress(**batch)) == 5


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = attached("llava_llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = inputs("llava_llama")
        model(
            **batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        ).loss.backward()
        grads.append(model.model.language_model.layers[0].self_attn.k_proj.weight.grad)
    assert grads[0].abs().max() > 0 and (grads[0] - grads[1]).abs().max() <= 1e-5


def test_no_gradient_reaches_pixels_but_through_the_voco_tokens():
    """The loss of text moves vision features only through C: with no reader of C, the pixels' gradient is
    zero.
    """
    model = attached("llava_llama")
    batch = inputs("llava_llama", [["bos", "t3", "img", "c2", "t4"]])
    pixels = batch["pixel_values"].requires_grad_()
    logits = model(**{**batch, "pixel_values": pixels}).logits
    before = text_columns(model, batch)[0][:4]  # text before the block sees nothing of it
    logits[0, before].sum().backward(retain_graph=True)
    assert pixels.grad.abs().max() == 0
    logits[0, text_columns(model, batch)[0][-1]].sum().backward()
    assert pixels.grad.abs().max() > 0


@torch.no_grad()
def test_under_peft():
    from peft import LoraConfig, get_peft_model

    model = attached("llava_llama")
    batch = inputs("llava_llama")
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2)
    ).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    logits = wrapped(**batch).logits
    with wrapped.disable_adapter():
        plain_logits = wrapped(**batch).logits
    assert (logits - plain_logits).abs().max() > 1e-3
    stream = wrapped.stream_inputs(batch)
    cached = wrapped(**stream, voco_cache=wrapped.compress(**batch)).logits
    from harness import largest_difference

    assert largest_difference(wrapped, batch, logits, stream, cached) <= 1e-4
    with wrapped.disable_adapter(), pytest.raises(ValueError, match="adapter is"):
        with torch.no_grad():
            cache = wrapped.compress(**batch)
        wrapped.base_model.enable_adapter_layers()
        wrapped(**stream, voco_cache=cache)


@pytest.mark.slow
@torch.no_grad()
def test_under_torch_compile():
    model = attached("llava_llama")
    batch = inputs("llava_llama")
    expected = model(**batch).logits
    compiled = torch.compile(model)
    got = compiled(**batch).logits
    real = batch["attention_mask"].bool()
    assert (got[real] - expected[real]).abs().max() <= 1e-4
    assert vp.is_attached(compiled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("input_ids"), "input_ids"),
        (lambda b: b.update(attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool)), "2-D"),
        (
            lambda b: b.update(position_ids=torch.arange(b["input_ids"].shape[1])[None]),
            "position_ids given do not agree",
        ),
    ],
)
@torch.no_grad()
def test_what_would_go_around_the_rule_is_refused(change, message):
    model = attached("llava_llama")
    batch = inputs("llava_llama", [["bos", "t3", "img", "c2", "t4"]])
    if message == "input_ids":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
        batch.pop("pixel_values")
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


@torch.no_grad()
def test_vision_without_voco_is_refused_but_under_causal():
    batch = inputs("llava_llama", [["bos", "img", "t4"]])
    with pytest.raises(LayoutError, match="sample 0, position 1"):
        attached("llava_llama")(**batch)
    expected = plain("llava_llama")(**batch).logits
    assert torch.equal(attached("llava_llama", rule="causal")(**batch).logits, expected)


@torch.no_grad()
def test_causal_is_the_plain_model_with_voco_tokens():
    batch = inputs("llava_llama")
    assert torch.equal(
        attached("llava_llama", rule="causal")(**batch).logits, plain("llava_llama")(**batch).logits
    )
    with pytest.raises(ValueError, match="rule='causal'"):
        attached("llava_llama", rule="causal").compress(**batch)


@torch.no_grad()
def test_an_mrope_family_needs_its_grids():
    model = attached("qwen2_5_vl")
    batch = inputs("qwen2_5_vl")
    whole = model(**batch).logits
    batch.pop("mm_token_type_ids")  # told from the ids
    assert torch.equal(model(**batch).logits, whole)
    with pytest.raises(ValueError, match="image_grid_thw"):
        model(**{k: v for k, v in batch.items() if k not in ("image_grid_thw", "pixel_values")})


def test_recurrent_and_convolutional_text_models_are_refused_by_name():
    from transformers import AutoConfig, AutoModelForImageTextToText

    for model_type, word in (("qwen3_5", "linear_attention"), ("lfm2_vl", "conv")):
        config = AutoConfig.for_model(model_type)
        text = config.get_text_config()
        small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 128}
        for key, value in small.items():
            setattr(text, key, value)
        text.layer_types = [word, "full_attention", word, "full_attention"]
        vision = config.vision_config
        for key in ("num_hidden_layers", "depth"):
            if hasattr(vision, key):
                setattr(vision, key, 1)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        with pytest.raises(ValueError, match=f"cannot be attached: {model_type} .*{word}.*past any mask"):
            vp.attach(model, vp.VoCoConfig(token_id=5))


def test_flash_attention_is_refused_not_ignored():
    model = plain("llava_llama")
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*cannot honour"):
        vp.attach(model, vp.VoCoConfig(token_id=4))


def test_attaching_twice_and_odd_ids_are_refused():
    model = attached("llava_llama")
    with pytest.raises(ValueError, match="already has VoCo attached"):
        vp.attach(model, vp.VoCoConfig(token_id=4))
    with pytest.raises(ValueError, match="outside the model's 181 embedding rows"):
        vp.attach(plain("llava_llama"), vp.VoCoConfig(token_id=999))
    with pytest.raises(ValueError, match="has no id"):
        vp.attach(plain("llava_llama"), vp.VoCoConfig())
    with pytest.raises(ValueError, match="is the image token itself"):
        broken = plain("llava_llama")
        vp.attach(broken, vp.VoCoConfig(token_id=broken.config.image_token_id))
    assert not vp.is_attached(broken)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
@torch.no_grad()
def test_saved_and_loaded_by_path_alone(name, tmp_path):
    model, its = plain(name), processor(name)
    vp.attach(model, vp.VoCoConfig(num_tokens=2, rule="star"), its)
    token = vp.attachment(model).vocab.voco_id
    from tiny import make_inputs

    batch = make_inputs(name, [["bos", "t3", "img", "c2", "t4"]], voco_id=token)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert "voco_sdpa" not in (tmp_path / "config.json").read_text()
    again, _ = vp.load(tmp_path)
    assert vp.attachment(again).config == vp.attachment(model).config
    assert vp.attachment(again).vocab == vp.attachment(model).vocab
    assert torch.equal(again(**batch).logits, expected)


def test_a_missing_path_is_one_clear_line():
    with pytest.raises(FileNotFoundError, match="model ./no/such/folder does not exist: give a folder"):
        vp.load("./no/such/folder")


def test_an_adapter_whose_base_is_gone_says_where_it_looked(tmp_path):
    import json

    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "runs/gone/base"}))
    with pytest.raises(
        FileNotFoundError, match=r"trained on runs/gone/base, which does not exist seen from /"
    ):
        vp.load(tmp_path)


def test_a_new_row_is_the_exact_mean_rounded_once():
    """So that every kind of CPU and GPU makes the same: a cache of one machine is read on another."""
    model = plain("llava_llama")
    torch.manual_seed(0)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.randn_like(model.get_input_embeddings().weight) * 100)
    rows = model.get_input_embeddings().weight.detach().clone()
    new = voco_id("llava_llama")
    known = rows.double().T.tolist()
    mean = torch.tensor([math.fsum(column) / len(column) for column in known], dtype=torch.float64)
    spread = [
        math.fsum((x - m) ** 2 for x in column) / len(column) for column, m in zip(known, mean, strict=True)
    ]
    draw = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(3)).double()
    wanted = (mean + draw * torch.tensor(spread, dtype=torch.float64).sqrt() * 0.01).float()
    config = vp.VoCoConfig(token_id=new, token_seed=3)
    vp.attach(model, config, vocabulary=vocabulary("llava_llama", model, config), initialize_token=True)
    assert torch.equal(model.get_input_embeddings().weight[new], wanted)
