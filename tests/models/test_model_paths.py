"""Names of models: a missing folder is named, whoever reads it; an adapter finds its base from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import voco_plugin as vp
from voco_plugin.config import CONFIG_NAME
from voco_plugin.models import load
from voco_plugin.models.encoders.base import load_encoder
from voco_plugin.models.encoders.spec import EncoderSpec
from voco_plugin.models.loading import auto_class
from voco_plugin.models.model_paths import base_of_adapter, note_base
from voco_plugin.registry import encoders


def made(folder: Path, weights: bytes = b"w" * 9000) -> Path:
    """What looks like a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def adapter_on(base: str, folder: Path) -> Path:
    """What looks like an adapter, as PEFT and ``save_voco_config`` leave it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 4}))
    (folder / CONFIG_NAME).write_text(json.dumps({"format_version": 1, "voco": {}}))
    return folder


def base_of(adapter: Path) -> str:
    return base_of_adapter(str(adapter), str(adapter / "adapter_config.json"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder to work in, with a base and an adapter whose base is noted."""
    folder = tmp_path / "project"
    made(folder / "runs" / "q" / "base")
    monkeypatch.chdir(folder)
    adapter = adapter_on("runs/q/base", folder / "runs" / "q" / "voco" / "_saving" / "checkpoint-2")
    note_base(adapter, folder / "runs" / "q" / "voco" / "checkpoint-2")
    adapter.rename(folder / "runs" / "q" / "voco" / "checkpoint-2")
    return folder


def test_an_adapter_finds_its_base_from_anywhere_and_after_both_have_moved(project, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    adapter = project / "runs" / "q" / "voco" / "checkpoint-2"
    assert base_of(adapter) == str(project / "runs" / "q" / "base")
    shutil.copytree(adapter, tmp_path / "alone")  # the adapter alone: the absolute path
    assert base_of(tmp_path / "alone") == str(project / "runs" / "q" / "base")
    (project / "runs").rename(tmp_path / "moved")
    assert base_of(tmp_path / "moved" / "q" / "voco" / "checkpoint-2") == str(
        tmp_path / "moved" / "q" / "base"
    )
    assert json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(FileNotFoundError, match=r"which does not exist, nor .*; put the base model back"):
        base_of(tmp_path / "alone")


def test_of_two_bases_that_differ_the_one_that_moved_along_is_taken_with_a_warning(
    project, tmp_path, monkeypatch
):
    monkeypatch.chdir("/")
    shutil.copytree(project, tmp_path / "copy")
    adapter = tmp_path / "copy" / "runs" / "q" / "voco" / "checkpoint-2"
    mine, other = tmp_path / "copy" / "runs" / "q" / "base", project / "runs" / "q" / "base"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert base_of(adapter) == str(mine), "two copies of one model are no reason to warn"
    (other / "model.safetensors").write_bytes(b"w" * 5000 + b"x" * 4000)
    with pytest.warns(UserWarning, match=f"trained on {other}, and {mine}, .* is another model"):
        assert base_of(adapter) == str(mine)


def test_an_older_checkpoint_names_its_base_from_a_folder_above_it_or_from_here(tmp_path, monkeypatch):
    base = made(tmp_path / "a" / "runs" / "base")
    old = adapter_on("runs/base", tmp_path / "a" / "runs" / "voco" / "checkpoint-2")
    monkeypatch.chdir("/")
    assert base_of(old) == str(base)
    monkeypatch.chdir(tmp_path / "a")
    shutil.move(old, tmp_path / "elsewhere")
    assert base_of(tmp_path / "elsewhere") == str(base)
    hub = adapter_on("org/model", tmp_path / "on_a_hub_id")
    note_base(hub)
    assert base_of(hub) == "org/model" and "relative" not in (hub / CONFIG_NAME).read_text()


def test_a_saved_adapter_loads_from_anywhere(bases, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    shutil.copytree(bases("llava_llama"), tmp_path / "p" / "runs" / "base")
    monkeypatch.chdir(tmp_path / "p")
    model, processor = load("runs/base", vp.VoCoConfig(num_tokens=2))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    wrapped.save_pretrained("runs/voco")
    processor.save_pretrained("runs/voco")
    vp.save_voco_config(wrapped, "runs/voco")
    monkeypatch.chdir("/")
    (tmp_path / "p").rename(tmp_path / "q")
    with warnings.catch_warnings():  # none of what a caller cannot change
        warnings.simplefilter("error")
        again, _ = load(tmp_path / "q" / "runs" / "voco")
    ids = torch.tensor([[1, 15, 16]])
    assert torch.equal(again(input_ids=ids).logits, wrapped.eval()(input_ids=ids).logits)
    assert (
        json.loads((tmp_path / "q/runs/voco" / CONFIG_NAME).read_text())["base_relative_to_adapter"]
        == "../base"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/nope", r"model runs/nope does not exist: give a folder"),
        ("~/nope", r"model .*/nope does not exist"),
        ("parts/nothng", r"model parts/nothng is no folder here .did you mean 'parts/nothing'"),
        ("nope", r"model nope is no folder here.*the hub does not give it"),
        ("empty", r"model empty is a folder without a config.json"),
        ("packed", r"a GGUF file holds a language model alone. Compose it .*llm: .*a.gguf"),
        ("packed/a.gguf", r"a GGUF file holds a language model alone"),
        ("text", r"text alone .llama. and has no image encoder.*llm: text"),
        ("a.txt", r"model a.txt is a file"),
    ],
)
def test_what_is_no_model_is_named_with_what_to_do(name, message, tmp_path, monkeypatch, text_only):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "parts/nothing", "empty", "packed"):
        os.makedirs(folder)
    Path("packed/a.gguf").touch()
    Path("a.txt").touch()
    shutil.copytree(text_only, "text")
    with pytest.raises((OSError, ValueError), match=message):
        load(name)


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("text")
    LlamaConfig(vocab_size=32, hidden_size=8, num_attention_heads=1, num_hidden_layers=1).save_pretrained(
        folder
    )
    return folder


def test_training_a_model_of_text_alone_says_how_it_gets_an_encoder(text_only):
    with pytest.raises(ValueError, match="has no image encoder. Compose one: in a recipe, model: {encoder"):
        vp.VoCoSFTTrainer(str(text_only), args=vp.VoCoSFTConfig(voco={"num_tokens": 1}, report_to="none"))


def test_every_family_still_counts_as_one_that_sees(bases):
    assert auto_class(bases("llava_llama")).__name__ == "AutoModelForImageTextToText"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ("siglip_so400m_384", "runs/nope"),
            "llm runs/nope: there is no config.json|llm runs/nope does not exist",
        ),
        (("siglip_so400m_384", "packed"), "llm packed/a.gguf is no GGUF file that can be read"),
        (("siglip_so400m_384", "parts/nothing"), "llm parts/nothing is no folder here"),
        (("runs/nope", "org/nothing"), "encoder runs/nope: there is no config.json"),
    ],
)
def test_a_missing_part_is_named(parts, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("packed")
    Path("packed/a.gguf").touch()
    with pytest.raises((OSError, ValueError), match=message):
        vp.compose(*parts)


def test_a_preset_that_the_hub_does_not_give_is_named():
    with pytest.raises(
        OSError, match="encoder siglip_so400m_384: google/siglip-so400m-patch14-384 is no folder"
    ):
        load_encoder("siglip_so400m_384")


@pytest.mark.parametrize("figure", ["hidden_size", "patch_size", "image_size"])
def test_figures_of_a_registered_encoder_are_held_against_the_model(figure, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8,
        patch_size=4,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path)
    right = {"hidden_size": 16, "patch_size": 4, "image_size": 8}
    encoders.register("right", EncoderSpec(str(tmp_path), **right))
    encoders.register("wrong", EncoderSpec(str(tmp_path), **{**right, figure: 2 * right[figure]}))
    try:
        assert load_encoder("right").hidden_size == 16
        if figure == "image_size":  # it is the size asked for, to which the tower is brought
            assert load_encoder("wrong").image_size == 16
        else:
            with pytest.raises(ValueError, match=f"registered with {figure}={2 * right[figure]}, and .* has"):
                load_encoder("wrong")
    finally:
        for name in ("right", "wrong"):
            encoders._entries.pop(name, None)
