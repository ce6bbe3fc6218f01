"""What a model's fingerprint is told from: the model itself, whoever holds it."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

import voco_plugin as vp
from harness import attached
from voco_plugin.cache import fingerprint
from voco_plugin.cache.fingerprint import blocks_made_by, model_hashes, processor_hash
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
    assert model_hashes(model, voco) is before


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
