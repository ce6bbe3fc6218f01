"""`voco train` with a `model:` section: the shipped recipe over tiny parts, whole and with LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import voco_plugin as vp
from voco_plugin.cli import main
from voco_plugin.gridworld.dataset import write_gridworld
from voco_plugin.gridworld.tiny_parts import ENCODERS, LLMS, write_tiny_encoder, write_tiny_llm
from voco_plugin.training.trainer import VoCoSFTTrainer

pytest.importorskip("timm", reason="timm is in the extra `backbones`")
pytest.importorskip("open_clip", reason="open_clip is in the extra `backbones`")
SHORT = [
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "2",
    "--warmup_steps",
    "0",
    "--logging_steps",
    "1",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, and every tiny part, with random weights."""
    root = tmp_path_factory.mktemp("world")
    write_gridworld(root / "runs" / "gridworld", num_train=8, num_test=2)
    for name in ENCODERS:
        write_tiny_encoder(root / "runs" / "parts" / name, name, (2, 4, 32), width=32, steps=0)
    for name in LLMS:
        write_tiny_llm(root / "runs" / "parts" / name, name, width=32, layers=2)
    return root


@pytest.mark.parametrize(
    ("encoder", "llm"),
    [
        pytest.param(e, m, marks=[] if ENCODERS.index(e) == LLMS.index(m) else pytest.mark.slow)
        for e in ENCODERS
        for m in LLMS
    ],
)
def test_the_shipped_recipe_trains_every_pair_by_changing_two_names(
    world, tmp_path, monkeypatch, encoder, llm
):
    monkeypatch.chdir(world)
    names = ["--model.encoder", f"runs/parts/{encoder}", "--model.llm", f"runs/parts/{llm}"]
    assert main(["train", "gridworld_compose", *names, *SHORT, "--output_dir", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["composed_of"]["encoder"], config["composed_of"]["llm"]) == (encoder, llm)
    start, _ = vp.compose(f"runs/parts/{encoder}", f"runs/parts/{llm}")
    model, processor = vp.load(tmp_path)
    vp.detach(model)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, start.state_dict()[n])}
    assert any("multi_modal_projector" in n for n in moved) and any("language_model" in n for n in moved)
    assert not any("vision_tower" in n for n in moved)
    assert "USER" in processor.chat_template


def test_lora_names_the_composed_model_as_its_base(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    lora = ["--use_peft", "--lora_r", "4", "--voco.num_tokens", "2", "--model.projector", "linear"]
    targets = ["--lora_target_modules", "q_proj", "v_proj"]
    arguments = [*lora, *targets, *SHORT, "--output_dir", str(tmp_path), "--voco.rule", "isolated"]
    assert main(["train", "gridworld_compose", *arguments]) == 0
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]) == tmp_path / "composed"
    assert adapter["modules_to_save"] == ["model.multi_modal_projector.linear_1"]
    model, _ = vp.load(tmp_path)
    fixed = model.get_base_model().model.multi_modal_projector.linear_2
    assert torch.equal(fixed.weight, torch.eye(32))
    assert vp.attachment(model).config.num_tokens == 2


@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "4"]], ids=["whole", "lora"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_composed_model_computes_as_the_recipe_says(world, tmp_path, monkeypatch, lora, attention):
    """LoRA's base is saved and loaded once more, under the recipe's settings."""
    seen = []
    real = VoCoSFTTrainer.train

    def watched(self, *arguments, **keywords):
        seen.extend(
            (p.dtype, self.model.config.text_config._attn_implementation) for p in self.model.parameters()
        )
        return real(self, *arguments, **keywords)

    monkeypatch.chdir(world)
    monkeypatch.setattr(VoCoSFTTrainer, "train", watched)
    settings = ["--attn_implementation", attention, "--dtype", "bfloat16", "--voco", "null", *lora]
    output = ["--output_dir", str(tmp_path), "--bf16", "true"]
    assert main(["train", "gridworld_compose", *settings, *SHORT, *output]) == 0
    frozen = {(torch.bfloat16, attention)}
    assert frozen <= set(seen) <= frozen | {(torch.float32, attention)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_init_kwargs.attn_implementation", "eager"], "are keys of the recipe itself"),
        (["--model.encoder", "runs/parts/gone"], "encoder runs/parts/gone: there is no config.json"),
        (["--model", "null"], "has no model_name_or_path: add it"),
        (["--use_peft", "--load_in_4bit"], "a model section and quantization exclude each other"),
    ],
)
def test_a_wrong_composition_is_one_line_and_status_2(world, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(world)
    assert main(["train", "gridworld_compose", *arguments]) == 2
    assert message in capsys.readouterr().err
