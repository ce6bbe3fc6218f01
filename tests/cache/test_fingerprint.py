"""What a model's fingerprint is told from: the model itself, whoever holds it."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

import voco_plugin as vp
from harness import CORE, attached, inputs, plain, vocabulary
from tiny import NAMES
from voco_plugin.cache import fingerprint
from voco_plugin.cache.fingerprint import blocks_made_by, model_hashes, processor_hash
from voco_plugin.cache.witness import Witness
from voco_plugin.core.attachment import unwrap
from voco_plugin.store.keys import fingerprint_of


def test_a_model_in_a_wrapper_is_that_model():
    model = attached("llava_llama")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    state = vp.attachment(peft)
    asked = [blocks_made_by(m, state) for m in (peft, unwrap(peft), torch.nn.parallel.DataParallel(peft))]
    assert asked[0] == asked[1] == asked[2] == fingerprint_of(peft)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1)
    later = [blocks_made_by(m, state) for m in (unwrap(peft), peft)]
    assert later[0] == later[1] != asked[0]


def test_what_changes_in_a_model_is_seen():
    """Values written in place, tensors and modules exchanged, another dtype, an adapter switched."""
    model = attached("llava_llama")
    voco = vp.attachment(model).vocab.voco_id
    layer = model.get_decoder().layers[0].self_attn

    def exchange_tensor():
        layer.v_proj.weight = torch.nn.Parameter(layer.v_proj.weight.detach() + 1)

    def exchange_module():
        layer.o_proj = torch.nn.Linear(layer.o_proj.in_features, layer.o_proj.out_features, bias=False)

    def write():
        with torch.no_grad():
            layer.q_proj.weight.add_(1)

    seen = [model_hashes(model, voco)]
    for change in (write, exchange_tensor, exchange_module, model.half):
        change()
        seen.append(model_hashes(model, voco))
        assert model_hashes(model, voco) == seen[-1]
    assert len({hashes["model"] for hashes in seen}) == len(seen)


def test_nothing_is_hashed_again_where_nothing_changed(monkeypatch):
    model = attached("llava_llama")
    voco = vp.attachment(model).vocab.voco_id
    before = model_hashes(model, voco)
    monkeypatch.setattr(fingerprint, "_hash_tensor", lambda *args: 1 / 0)
    assert model_hashes(model, voco) == before


class Part:
    def __init__(self, **settings) -> None:
        vars(self).update(settings)
        self.written = 0

    def to_dict(self) -> dict:
        self.__class__.count += 1
        return {k: v for k, v in vars(self).items() if k != "written"}

    count = 0


def test_a_processors_settings_are_written_out_when_one_changed():
    part = Part(size={"height": 4}, mean=[0.5])
    its = type("Processor", (), {"image_processor": part})()
    first = processor_hash(its)
    assert processor_hash(its) == first and Part.count == 1
    part.size["height"] = 5  # in place
    assert processor_hash(its) != first and Part.count == 2
    part.size["height"] = 4
    assert processor_hash(its) == first
    part.mean = torch.ones(2)  # what cannot be compared at once is written out each time
    assert processor_hash(its) == processor_hash(its) != first


# -- what computes besides weights


def loras(model, name: str = "default", **options):
    """A LoRA whose weights are not 0, as a PEFT model."""
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", **options)
    peft = get_peft_model(model, config, adapter_name=name)
    return moved(peft, name)


def moved(peft, name: str):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight_name, weight in peft.named_parameters():
            if f".{name}." in weight_name:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return peft


def of(model):
    return fingerprint_of(model)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llava_llama", "vision_feature_layer", -1),
        ("llava_llama", "vision_feature_select_strategy", "full"),
        ("llava_llama", "text_config.rms_norm_eps", 1e-2),
        ("llava_llama", "text_config.hidden_act", "gelu"),
        ("llava_llama", "text_config.rope_parameters.rope_theta", 5e5),
        ("llava_llama", "text_config.rope_parameters.factor", 4.0),
        ("llava_llama", "vision_config.layer_norm_eps", 1e-2),
        ("qwen2_5_vl", "text_config.rope_parameters.mrope_section", [4, 2, 2]),
        ("qwen2_5_vl", "vision_config.fullatt_block_indexes", [0]),
        ("gemma3", "text_config.query_pre_attn_scalar", 32),
        ("gemma3", "text_config.sliding_window", 4),
    ],
)
def test_what_a_config_computes_with_is_told_and_named(name, field, value):
    model = attached(name)
    cache = model.compress(**inputs(name))
    part, names = model.config, field.split(".")
    for step in names[:-1]:
        part = part[step] if isinstance(part, dict) else getattr(part, step)
    if isinstance(part, dict):
        part[names[-1]] = value
    else:
        setattr(part, names[-1], value)
    with pytest.raises(ValueError, match=rf"not made by this model .*: {re.escape(field)} is .*, not "):
        model(**model.stream_inputs(inputs(name)), voco_cache=cache)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name_or_path", "elsewhere"),
        ("transformers_version", "4.0"),
        ("use_cache", False),
        ("dtype", "float64"),
        ("architectures", ["Other"]),
        ("text_config.max_position_embeddings", 9999),
        ("text_config.attention_dropout", 0.5),
        ("text_config.initializer_range", 0.5),
        ("text_config.eos_token_id", 3),
    ],
)
def test_what_changes_no_key_is_not_told(field, value):
    model = attached("llava_llama")
    before, (*path, last) = of(model), field.split(".")
    part = model.config
    for step in path:
        part = getattr(part, step)
    setattr(part, last, value)
    assert of(model) == before


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in CORE else pytest.mark.matrix) for n in NAMES]
)
def test_a_saved_model_is_itself_again(name, tmp_path):
    """Whatever is left out of a config's file, and filled in when it is read."""
    model = attached(name)
    model.save_pretrained(tmp_path)
    again = type(plain(name)).from_pretrained(tmp_path)
    config = vp.VoCoConfig(token_id=vp.attachment(model).vocab.voco_id)
    vp.attach(again, config, vocabulary=vocabulary(name, again, config))
    assert of(again)["settings"] == of(model)["settings"]
    assert of(again)["model"] == of(model)["model"]


def test_what_lora_scales_by_is_told():
    made, batch = {}, inputs("llava_llama")
    for alpha in (2, 8):
        model = loras(attached("llava_llama"), lora_alpha=alpha).get_base_model()
        made[alpha] = model.compress(**batch)
    with pytest.raises(ValueError, match=r": adapter's scaling is 1\.0, not 4\.0\.$"):
        model(**model.stream_inputs(batch), voco_cache=made[2])
    layer = next(m for m in model.modules() if hasattr(m, "scale_layer"))
    layer.scale_layer(0.5)
    with pytest.raises(ValueError, match="adapter's scaling is "):
        model(**model.stream_inputs(batch), voco_cache=made[8])
    layer.unscale_layer()
    model(**model.stream_inputs(batch), voco_cache=made[8])


def test_buffers_that_are_saved_are_told():
    model = attached("llava_llama")
    model.model.vision_tower.register_buffer("running_mean", torch.zeros(4))
    before = of(model)
    model.model.vision_tower.running_mean += 1
    assert of(model) != before
    model.model.vision_tower.running_mean.zero_()
    assert of(model) == before


# -- weights written to without a word


WRITES = {
    "all of them": lambda p: p.data.mul_(1.5),
    "another tensor": lambda p: setattr(p, "data", p.data * 1.5),
    "not a number": lambda p: p.data.fill_(float("nan")),
    "a column": lambda p: p.data[:, 3].add_(1),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("weight", ["q_proj", "embed_tokens", "lora_A", "fc1"])
def test_a_write_through_data_is_seen(weight, write):
    model = loras(attached("llava_llama")).get_base_model()
    batch = inputs("llava_llama")
    cache = model.compress(**batch)
    found = next(p for n, p in model.named_parameters() if weight in n and p.dim() == 2)
    WRITES[write](found)
    with pytest.raises(ValueError, match="model is|adapter is"):
        model(**model.stream_inputs(batch), voco_cache=cache)


def test_a_write_into_the_tokens_row_is_seen():
    model = attached("llava_llama")
    batch = inputs("llava_llama")
    cache, voco = model.compress(**batch), vp.attachment(model).vocab.voco_id
    model.get_input_embeddings().weight.data[voco, 5] += 1
    with pytest.raises(ValueError, match="model is"):
        model(**model.stream_inputs(batch), voco_cache=cache)


def test_weights_written_back_are_the_model_that_was():
    """A swap with averaged weights, for an evaluation, and back."""
    model = attached("llava_llama")
    first = of(model)
    kept = {name: p.data.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data.copy_(p.data * 0.9)
    assert of(model) != first
    for name, p in model.named_parameters():
        p.data.copy_(kept[name])
    assert of(model) == first


def test_a_merged_adapter_is_seen():
    """PEFT merges through ``.data``."""
    peft = loras(attached("llava_llama"))
    before = of(peft)
    peft.merge_adapter()
    assert of(peft) != before


def test_a_witness_keeps_no_memory():
    """A model moved elsewhere gives its memory back, though nobody asked for its hash since."""
    model = attached("llava_llama")
    of(model)
    storage = weakref.ref(model.lm_head.weight.untyped_storage())
    model.to(torch.float64)
    assert storage() is None
    assert of(model)["dtype"] == "float64"


def test_a_witness_of_every_layout():
    """Transposed, complex, empty, without values, of one value, of 8 bits; none of which raises."""
    tensors = [
        torch.randn(8, 70).T,
        torch.randn(100, dtype=torch.complex64),
        torch.empty(0, 3),
        torch.empty(4, 4, device="meta"),
        torch.ones(()),
        torch.arange(200, dtype=torch.uint8),
        torch.randn(40, 40)[:, 3],
    ]
    witness = Witness(tensors)
    assert witness.same(tensors)
    for number in (0, 1, 4, 5, 6):
        before = tensors[number].clone()
        tensors[number].data.add_(1)
        assert not witness.same(tensors)
        tensors[number].data.copy_(before)
    assert witness.same(tensors)


# -- adapters that are loaded


def two_adapters():
    peft = loras(attached("llava_llama"))
    peft.add_adapter("second", LoraConfig(r=4, target_modules=r".*language_model.*\.(o_proj|v_proj)"))
    return moved(peft, "second")


def test_an_idle_adapter_changes_nothing():
    peft = loras(attached("llava_llama"))
    batch, model = inputs("llava_llama"), peft.get_base_model()
    alone, cache = of(peft), model.compress(**batch)
    options = LoraConfig(r=4, target_modules=r".*language_model.*\.o_proj", modules_to_save=["lm_head"])
    peft.add_adapter("second", options)
    moved(peft, "second")
    assert of(peft) == alone
    model(**model.stream_inputs(batch), voco_cache=cache)
    peft.set_adapter("second")
    with pytest.raises(ValueError, match="adapter is"):
        model(**model.stream_inputs(batch), voco_cache=cache)
    peft.set_adapter("default")
    assert of(peft) == alone
    with peft.disable_adapter(), pytest.raises(ValueError, match=r": the adapter is another one .*none"):
        model(**model.stream_inputs(batch), voco_cache=cache)
    peft.delete_adapter("second")
    assert of(peft) == alone


def test_a_model_with_its_adapters_off_is_the_model_without():
    model = attached("llava_llama")
    plain = of(model)
    peft = loras(model, modules_to_save=["lm_head"])
    assert of(peft) != plain
    with peft.disable_adapter():
        assert of(peft) == plain
    assert of(peft) != plain


def test_what_an_adapter_is_called_is_not_told():
    default, other = (loras(attached("llava_llama"), name) for name in ("default", "mine"))
    assert of(default) == of(other)


def test_two_active_adapters_are_not_one():
    peft = two_adapters()
    one = of(peft)
    peft.base_model.set_adapter(["default", "second"])
    both = of(peft)
    assert one["adapter"] != both["adapter"] and one["model"] == both["model"]


@pytest.mark.parametrize(
    "kind", ["LoHaConfig", "IA3Config", "OFTConfig", "HRAConfig", "BOFTConfig", "VeraConfig"]
)
def test_other_adapters_are_adapters(kind):
    """Whatever PEFT calls their weights: off, the model is the one without; idle, they take no part."""
    import peft

    options = {"target_modules": r".*language_model.*\.(q_proj|o_proj)"}
    if kind == "IA3Config":
        options["feedforward_modules"] = []
    if kind == "OFTConfig":
        options |= {"oft_block_size": 4, "use_cayley_neumann": False}
    if kind == "BOFTConfig":
        options["boft_block_size"] = 4
    model = attached("llava_llama")
    plain = of(model)
    tuned = get_peft_model(model, getattr(peft, kind)(**options))
    first = of(tuned)
    assert first["model"] == plain["model"] and first["adapter"] != "none"
    with tuned.disable_adapter():
        assert of(tuned) == plain
    with torch.no_grad():
        next(p for n, p in tuned.named_parameters() if ".default" in n).add_(1)
    assert of(tuned)["adapter"] != first["adapter"] and of(tuned)["model"] == plain["model"]
