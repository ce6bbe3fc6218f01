"""An adapter and its base become one checkpoint: the same logits, and a new adapter starts from it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import voco_plugin as vp
from trainers import logits, trainer
from voco_plugin.cli import main
from voco_plugin.models.merging import merge_adapter


@pytest.mark.parametrize("base", ["llava_tied", "llava_onevision"])
@pytest.mark.parametrize("voco", [True, None], ids=["voco", "plain"])
def test_merged_weights_give_the_adapters_logits(bases, data, tmp_path, base, voco) -> None:
    out = tmp_path / "lora"
    # the projector too: copies of modules are merged, and loose parameters are there
    trained = trainer(bases(base), out, data, voco=voco, train_projector=True, max_steps=2)
    trained.train()
    trained.save_model()
    made = merge_adapter(out, tmp_path / "merged")
    assert not (made / "adapter_config.json").exists()
    if voco:
        wanted, found = vp.load(out), vp.load(made)
        assert vp.attachment(found[0]).config.num_tokens == 2
        untrained = vp.load(bases(base), voco=vp.VoCoConfig(num_tokens=2))
    else:
        from peft import PeftModel

        plain = AutoModelForImageTextToText.from_pretrained(bases(base))
        wanted = PeftModel.from_pretrained(plain, out).eval(), AutoProcessor.from_pretrained(out)
        found = AutoModelForImageTextToText.from_pretrained(made).eval(), AutoProcessor.from_pretrained(made)
        untrained = AutoModelForImageTextToText.from_pretrained(bases(base)).eval(), wanted[1]
    assert (logits(*found) - logits(*wanted)).abs().max() < 1e-4  # fp32; logits spread over 20
    assert (logits(*found) - logits(*untrained)).abs().max() > 1e-3
    # and a new adapter trains on it
    again = trainer(str(made), tmp_path / "again", data, voco=True, max_steps=1)
    again.train()
    again.save_model()
    assert torch.isfinite(logits(*vp.load(tmp_path / "again"))).all()


def test_the_base_of_an_adapter_without_voco_is_the_vlm_it_makes(bases, data, recipe_data, tmp_path) -> None:
    """``voco eval --mode base`` took it off, as it does one that was trained with VoCo."""
    out = tmp_path / "lora"
    trained = trainer(bases("llava_llama"), out, data, voco=None, max_steps=3, learning_rate=3e-2)
    trained.train()
    trained.save_model()
    folders = {
        "adapter": out,
        "merged": merge_adapter(out, tmp_path / "merged"),
        "start": bases("llava_llama"),
    }
    answers = {}
    for name, folder in folders.items():
        words = ["--data", str(recipe_data), "--mode", "base", "--mode", "blind", "--max-new-tokens", "4"]
        told = tmp_path / f"{name}.json"
        assert main(["eval", str(folder), *words, "--out", str(told), "--json"]) == 0
        scores = json.loads(told.read_text())["scores"]
        answers[name] = scores["base"]["answers"] + scores["blind"]["answers"]
    assert answers["adapter"] == answers["merged"] != answers["start"]


def test_what_cannot_be_merged_is_refused_in_a_line(bases, data, tmp_path, capsys) -> None:
    out = tmp_path / "lora"
    trainer(bases("llava_llama"), out, data, max_steps=1).save_model(str(out))
    assert main(["merge", str(bases("llava_llama")), str(tmp_path / "a")]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "nothing"), str(tmp_path / "a")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    assert main(["merge", str(out), str(tmp_path / "there")]) == 2
    assert "exists" in capsys.readouterr().err
    config = json.loads((out / "voco_config.json").read_text())
    for change in ({"frozen_stage1": True}, {"adapter_stages": "compress"}):
        changed = {**config, "voco": {**config["voco"], **change}}
        (out / "voco_config.json").write_text(json.dumps(changed))
        assert main(["merge", str(out), str(tmp_path / "a")]) == 2
        assert next(iter(change)) in capsys.readouterr().err
    (out / "voco_config.json").write_text(json.dumps(config))
    assert main(["merge", str(out), str(tmp_path / "a"), "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merged"] == str(tmp_path / "a")
    assert vp.load(tmp_path / "a")[0].dtype == torch.bfloat16
    assert not list(tmp_path.glob("*partial*"))


def test_merged_and_trained_whole_weights_have_it_and_adapters_do_not(bases, data, tmp_path) -> None:
    out = tmp_path / "lora"
    trained = trainer(bases("llava_llama"), out, data, max_steps=1)
    trained.train()
    trained.save_model()
    assert not (out / "modeling_voco.py").exists()
    merged = merge_adapter(out, tmp_path / "merged")
    found = AutoModelForImageTextToText.from_pretrained(merged, trust_remote_code=True)
    tools = AutoProcessor.from_pretrained(merged)
    assert (logits(found, tools) - logits(*vp.load(out))).abs().max() < 1e-4
    second = trainer(str(merged), tmp_path / "second", data, max_steps=1)  # an adapter on it
    second.save_model(str(tmp_path / "second"))
    with pytest.raises(ValueError, match=r"second is an adapter.* voco_plugin.load"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "second", trust_remote_code=True)
    whole = trainer(
        str(merged), tmp_path / "whole", data, peft=False, max_steps=1, save_strategy="steps", save_steps=1,
        trust_remote_code=True,
    )  # fmt: skip
    whole.train()
    whole.save_model()
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-1"):
        found = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(logits(found, tools), logits(*vp.load(folder)))
        assert "trust_remote_code=True" in (folder / "README.md").read_text()
    again = trainer(
        str(merged), tmp_path / "whole", data, peft=False, max_steps=2, trust_remote_code=True
    )  # its weights are read as plain ones
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert again.state.global_step == 2
