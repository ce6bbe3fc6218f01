"""The language model alone beside moved blocks computes what the attached model does, or is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from harness import attached, inputs, shared
from stand_alone import STAND_ALONE
from tiny.models import NAMES
from voco_plugin.cache import VoCoCacheError
from voco_plugin.cache.engine_file import EngineFile, LayerRope
from voco_plugin.core.attachment import attachment
from voco_plugin.core.forward import as_cache
from voco_plugin.serving.export import engine_file_of, write_text_model
from voco_plugin.serving.text_model import NotExportableError, refusal, text_model_of

ROWS = [["bos", "t3", "img", "c2", "img", "c3", "t4", "img", "c1", "t2"]]
ELSEWHERE = [["bos", "t9", "img", "c2", "img", "c3", "t1", "img", "c1", "t2"]]
REFUSED = {
    "window or a chunk": [
        "llava_mistral", "gemma3", "llava_gemma2", "mistral3_window", "llama4", "aya_vision",
        "cohere2_vision",
    ],
    "(MLA)": ["llava_deepseek", "kimi_k25"],
    "both ways": ["paligemma", "paligemma2"],
    "three axes": ["ernie4_5_vl_moe"],
    "inside its language model": ["phi4_multimodal"],
    "inputs of its own for every layer": ["gemma4", "gemma4_both_ways"],
}  # fmt: skip


def test_every_family_stands_alone_or_is_refused_by_name():
    assert sorted(STAND_ALONE + sum(REFUSED.values(), [])) == sorted(NAMES)


@pytest.mark.parametrize(("reason", "name"), [(r, n) for r, names in REFUSED.items() for n in names])
def test_a_language_model_that_cannot_is_refused(reason, name):
    with pytest.raises(NotExportableError, match="no language model of its own for an engine") as caught:
        text_model_of(shared(name))
    assert reason in str(caught.value)


@torch.no_grad()
def _as_an_engine(made, file: EngineFile, stream: torch.Tensor, cache) -> torch.Tensor:
    """Logits of a stream `(1, S)`, read run by run: text through the model, blocks as moved keys."""
    past, blocks, logits, at = DynamicCache(), iter(cache), [], 0
    while at < stream.shape[1]:
        if int(stream[0, at]) == file.voco_id:
            block = next(blocks)
            for layer, key in enumerate(file.move(block.keys, at - block.position)):
                past.update(key[None], block.values[layer][None], layer)
            logits.append(torch.full((1, block.num_tokens, made.config.vocab_size), float("nan")))
            at += block.num_tokens
            continue
        end = at + 1
        while end < stream.shape[1] and int(stream[0, end]) != file.voco_id:
            end += 1
        positions = torch.arange(at, end)[None]
        logits.append(made(input_ids=stream[:, at:end], position_ids=positions, **as_cache(past)).logits)
        at = end
    assert next(blocks, None) is None
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", STAND_ALONE)
@torch.no_grad()
def test_beside_moved_blocks_it_answers_as_stage_two_does(name):
    model = shared(name)
    made = text_model_of(model)
    file = engine_file_of(model, made)
    batch = inputs(name, ROWS)
    stream = model.stream_inputs(batch)
    cache = model.compress(**inputs(name, ELSEWHERE))
    wanted = model(**stream, voco_cache=cache).logits
    found = _as_an_engine(made, file, stream["input_ids"], cache)
    width = min(wanted.shape[-1], found.shape[-1])
    text = ~wanted[0].isnan().any(-1)
    assert int(text.sum()) == 10
    assert (found[0, text, :width] - wanted[0, text, :width]).abs().max() <= 1e-4
    still = dataclasses.replace(file, layers=tuple(LayerRope("none") for _ in file.layers))
    unmoved = _as_an_engine(made, still, stream["input_ids"], cache)
    assert (unmoved[0, text, :width] - wanted[0, text, :width]).abs().max() > 1e-3, "moving must matter"


def test_weights_are_shared_and_the_attached_model_does_not_change():
    model = shared("llava_llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = text_model_of(model)
    assert made.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    made.set_attn_implementation("sdpa")
    assert attachment(model).family.text_model(model).config._attn_implementation.startswith("voco")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not hasattr(made, "_voco_attachment")


@pytest.mark.parametrize("stages", ["both", "compress", "separate"])
@pytest.mark.parametrize("name", ["llava_llama", "llava_tied"])
@torch.no_grad()
def test_an_adapter_is_merged_where_it_reads(name, stages):
    from peft import LoraConfig, get_peft_model

    model = attached(name, adapter_stages=stages)
    voco = attachment(model).vocab.voco_id
    lora = LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)", init_lora_weights=False,
        trainable_token_indices=[voco],
    )  # fmt: skip
    plain = text_model_of(model)
    names = ["compress", "read"] if stages == "separate" else ["default"]
    tuned = get_peft_model(model, lora, adapter_name=names[0])
    if stages == "separate":
        tuned.add_adapter(
            "read", LoraConfig(r=4, target_modules=lora.target_modules, init_lora_weights=False)
        )
        tuned.base_model.set_adapter(names)
    for parameter_name, parameter in tuned.named_parameters():
        if "trainable_tokens_delta" in parameter_name:
            parameter.data += 0.1
    tuned.eval()
    before = {n: v.clone() for n, v in tuned.state_dict().items()}
    made = text_model_of(tuned)  # compares the logits itself
    assert all(torch.equal(before[n], v) for n, v in tuned.state_dict().items())
    assert not any("lora" in n for n, _ in made.named_modules())
    same = torch.equal(
        made.model.layers[0].self_attn.q_proj.weight, plain.model.layers[0].self_attn.q_proj.weight
    )
    assert same == (stages == "compress")


def test_a_language_model_that_computes_otherwise_is_noticed(monkeypatch):
    model = shared("llava_llama")
    from voco_plugin.serving import text_model

    real = text_model._merged

    def wrong(*args):
        text, head = real(*args)
        text.norm.weight = torch.nn.Parameter(text.norm.weight + 1)
        return text, head

    monkeypatch.setattr(text_model, "_merged", wrong)
    with pytest.raises(NotExportableError, match="gives other logits"):
        text_model_of(model)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"rule": "causal"}, "no blocks"),
        ({"positions": "sequential"}, "positions='compact'"),
        ({"hide_prefix": True}, "hide_prefix"),
    ],
)
def test_a_rule_that_an_engine_cannot_keep_is_refused(changed, reason):
    model = attached("llava_llama", **changed)
    assert reason in refusal(model)


@torch.no_grad()
def test_the_folder_loads_as_any_language_model(tmp_path):
    model = shared("llava_llama")
    from tiny.processors import processor as processor_of

    processor = processor_of("llava_llama")
    out = write_text_model(model, processor, tmp_path / "engine")
    made = AutoModelForCausalLM.from_pretrained(out)
    file = EngineFile.read(out)
    assert type(made).__name__ == "LlamaForCausalLM" and file.voco_id == attachment(model).vocab.voco_id
    assert len(AutoTokenizer.from_pretrained(out)) == len(processor.tokenizer)
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(made(input_ids=ids).logits, text_model_of(model)(input_ids=ids).logits)
    with pytest.raises(FileExistsError):
        write_text_model(model, processor, out)
    whole = (out / "voco_engine.json").read_text()
    for damaged in ("{", whole.replace('"format_version": 1', '"format_version": 9'), "[]",
                    whole.replace('"halves"', '"spirals"'), json.dumps({"format_version": 1})):  # fmt: skip
        (out / "voco_engine.json").write_text(damaged)
        with pytest.raises(VoCoCacheError, match="export the checkpoint again"):
            EngineFile.read(out)
    with pytest.raises(FileNotFoundError, match="voco export"):
        EngineFile.read(tmp_path)
