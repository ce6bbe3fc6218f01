"""A LoRA that another trainer made of a VLM is trained on under the rule, as one adapter, from its folder."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import tiny
import voco_plugin as vp
from tiny import processors
from trainers import logits, trainer

TOWER_TOO = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}


def moved_weights(model):
    """As if trained: none of its updates is zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("grown") / "base")
    tiny.build("llava_llama").save_pretrained(folder)
    processors.processor("llava_llama").save_pretrained(folder)
    return folder


def others(base, folder, config):
    """An adapter as any PEFT script saves it, with its processor; gives the model back."""
    model = moved_weights(get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config))
    processor = AutoProcessor.from_pretrained(base)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("voco", [{}, {"token_init": "pooled"}, {"compressor": "avg_pool"}], ids=str)
@pytest.mark.parametrize("projector", [[], ["multi_modal_projector"]], ids=["lora", "projector"])
def test_it_is_one_adapter_with_the_voco_token_in_it(base, data, tmp_path, voco, projector):
    others(base, tmp_path / "theirs", LoraConfig(**TOWER_TOO, modules_to_save=projector))
    rule = vp.VoCoConfig(num_tokens=2, **voco)
    made = trainer(str(tmp_path / "theirs"), tmp_path / "run", data, peft=False, voco=rule)
    expected, processor = vp.load(str(tmp_path / "theirs"), voco=rule)
    assert any("vision_tower" in n for n, p in made.model.named_parameters() if p.requires_grad)
    assert torch.equal(logits(made.model.eval(), processor), logits(expected, processor)), "starts as it was"
    made.model.train()
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.train()
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(before[n], p)}
    assert any("token_adapter" in n for n in moved) == ("compressor" not in voco)
    assert any("voco_compressor" in n for n in moved) == bool(voco)
    assert any("multi_modal_projector" in n for n in moved) == bool(projector)
    assert all(any(word in n for n in moved) for word in ("lora_A", "lora_B"))
    made.save_model()
    again, _ = vp.load(str(tmp_path / "run"))
    assert isinstance(again, PeftModel) and list(again.peft_config) == ["default"]
    assert torch.allclose(logits(again, processor), logits(made.model.eval(), processor), atol=1e-6)


def test_without_training_the_token_it_keeps_its_own_shape(base, data, tmp_path):
    others(base, tmp_path / "theirs", LoraConfig(**TOWER_TOO))
    made = trainer(str(tmp_path / "theirs"), tmp_path / "run", data, peft=False, train_voco=False)
    made.train()
    assert not any("token_adapter" in n for n, _ in made.model.named_parameters())


def test_without_voco_it_is_trained_on_as_it_is(base, data, tmp_path):
    model, processor = others(base, tmp_path / "theirs", LoraConfig(**TOWER_TOO))
    made = trainer(str(tmp_path / "theirs"), tmp_path / "run", data, peft=False, voco=False)
    assert not vp.is_attached(made.model)
    assert torch.equal(logits(made.model.eval(), processor), logits(model, processor))
    made.model.train()
    made.train()
    assert not torch.equal(logits(made.model.eval(), processor), logits(model, processor))


def test_a_method_that_holds_no_row_is_refused_with_the_way_out(base, data, tmp_path):
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    others(base, tmp_path / "theirs", config)
    with pytest.raises(ValueError, match=r"method IA3, which cannot hold the VoCo token's row: merge it"):
        trainer(str(tmp_path / "theirs"), tmp_path / "run", data, peft=False)


def test_with_a_second_lora_it_is_refused(base, data, tmp_path):
    others(base, tmp_path / "theirs", LoraConfig(**TOWER_TOO))
    with pytest.raises(ValueError, match="peft_config"):
        trainer(str(tmp_path / "theirs"), tmp_path / "run", data, peft=True)
