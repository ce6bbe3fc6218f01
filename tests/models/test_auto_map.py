"""A saved or merged model is found by transformers' auto classes with its rule (``trust_remote_code=True``),
and without it as the plain class it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import voco_plugin as vp
from paths import ROOT
from sessions import made, pictures

NAMES = ["llava_llama", "qwen2_5_vl", "gemma3"]


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch) -> Path:
    """Where transformers copies modeling files to."""
    from transformers import dynamic_module_utils

    place = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(place))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", sys.modules)
    before = set(sys.modules)
    yield place
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    """A model's folder, and the model that was saved there."""
    model, _ = made(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "my-model.v1"
    model.save_pretrained(folder)
    return folder, model


def scores(model, tools) -> list:
    return vp.log_likelihood(model, tools, ["What?"], [["red", "x y"]], images=[pictures(1)])[0]


def test_trusted_it_has_its_rule_and_untrusted_it_is_plain(saved) -> None:
    folder, model = saved
    found = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    tools = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert vp.is_attached(found) and not found.training
    assert vp.attachment(found).config == vp.attachment(model).config
    assert type(found).__name__ == type(model).__name__ == found.config.architectures[0]
    assert scores(found, tools) == scores(model, tools) == scores(*vp.load(folder))
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert not vp.is_attached(plain) and type(plain).__module__.startswith("transformers.models.")
    assert type(plain) in type(found).__mro__
    assert not hasattr(plain, "insert_voco_tokens")
    again, _ = vp.load(folder, trust_remote_code=True)  # which attaches once
    assert scores(again, tools) == scores(model, tools)


def test_config_and_file_name_the_package(saved) -> None:
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_voco.VoCoForImageTextToText"
    text = (folder / "modeling_voco.py").read_text()
    assert "pip install -U voco_plugin" in text and len(text.splitlines()) < 25
    assert "AutoConfig" not in config["auto_map"] and "AutoProcessor" not in config["auto_map"]
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "without the\nrule unless" in card


def test_every_auto_class_of_the_model_gives_the_rule(saved) -> None:
    folder, _ = saved
    for name in json.loads((folder / "config.json").read_text())["auto_map"]:
        loader = getattr(transformers, name)
        assert vp.is_attached(loader.from_pretrained(folder, trust_remote_code=True)), name
        assert not vp.is_attached(loader.from_pretrained(folder)), name


def test_twice_moved_and_renamed(saved, tmp_path, own_modules) -> None:
    folder, model = saved
    tools = AutoProcessor.from_pretrained(folder)
    import shutil

    moved = Path(shutil.copytree(folder, tmp_path / "else" / "where"))
    for place in (folder, folder, str(moved), moved, f"{moved}/"):
        found = AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True)
        assert scores(found, tools) == scores(model, tools)
    assert list(own_modules.rglob("modeling_voco.py"))


def test_what_was_loaded_is_saved_as_it_was(saved, tmp_path) -> None:
    folder, model = saved
    found = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    found.save_pretrained(tmp_path / "again")
    for name in ("config.json", "modeling_voco.py"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()
    rules = [json.loads((at / "voco_config.json").read_text()) for at in (tmp_path / "again", folder)]
    assert len({json.dumps({**rule, "row_made": None}) for rule in rules}) == 1
    once_more = AutoModelForImageTextToText.from_pretrained(tmp_path / "again", trust_remote_code=True)
    tools = AutoProcessor.from_pretrained(tmp_path / "again")
    assert scores(once_more, tools) == scores(model, tools)
    vp.detach(found).save_pretrained(tmp_path / "plain")  # and without the rule it is named nowhere
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not vp.is_attached(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    )


def test_options_of_from_pretrained(saved) -> None:
    folder, model = saved
    load = AutoModelForImageTextToText.from_pretrained
    found = load(folder, trust_remote_code=True, dtype=torch.bfloat16, device_map="cpu")
    assert vp.is_attached(found) and found.dtype == torch.bfloat16
    assert vp.is_attached(found) and {p.device.type for p in found.parameters()} == {"cpu"}
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config().rms_norm_eps = 1e-3
    found = load(folder, config=config, trust_remote_code=True, attn_implementation="eager")
    assert found.config.get_text_config().rms_norm_eps == 1e-3
    assert found.config.get_text_config()._attn_implementation == "voco_auto_eager"
    four = load(folder, trust_remote_code=True, voco=vp.VoCoConfig(num_tokens=4))
    assert vp.attachment(four).config.num_tokens == 4
    with pytest.raises(ValueError, match="output_loading_info"):
        load(folder, trust_remote_code=True, output_loading_info=True)
    with pytest.raises(ValueError, match="from_config makes a model with new weights"):
        AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), trust_remote_code=True)


def test_a_subfolder_and_a_folder_without_its_rule(saved, tmp_path) -> None:
    import shutil

    folder, model = saved
    vp.load(folder.parent, subfolder=folder.name)
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "voco_config.json").unlink()
    with pytest.raises(ValueError, match="no voco_config.json"):
        AutoModelForImageTextToText.from_pretrained(bare, trust_remote_code=True)


def test_another_library_s_file_is_kept(tmp_path) -> None:
    from voco_plugin.inference.modeling_file import write_modeling_file

    model, _ = made("llava_llama")
    theirs = {"auto_map": {"AutoModelForImageTextToText": "modeling_theirs.Theirs"}}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    assert not write_modeling_file(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text()) == theirs
    assert not (tmp_path / "modeling_voco.py").exists()


HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "voco_plugin":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
from transformers import AutoModelForImageTextToText, AutoProcessor
plain = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(plain).__name__)
for _ in range(2):
    try:
        AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as problem:
        print(problem)
sys.meta_path.pop(0)  # installed now
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model.insert_voco_tokens.__name__)
"""


def test_without_the_package_and_with_it(tmp_path) -> None:
    model, _ = made("llava_llama")
    model.save_pretrained(tmp_path / "model")
    cache = str(tmp_path / "cache")
    environment = {**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HIDDEN, str(tmp_path / "model")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    name, *errors, attached = ended.stdout.splitlines()
    assert name == "LlavaForConditionalGeneration"
    assert len(errors) == 2 and all("pip install -U voco_plugin" in line for line in errors)
    assert attached == "LlavaForConditionalGeneration insert_voco_tokens"


def test_the_causal_class_too_where_transformers_maps_the_model_there(tmp_path) -> None:
    model, _ = made("gemma3")
    model.save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert "AutoModelForCausalLM" in named
    assert vp.is_attached(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True))
