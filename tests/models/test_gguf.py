"""LLMs out of GGUF files: read as they were written, composed, and saved as ordinary checkpoints."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import voco_plugin as vp
from tiny.packed import llama, write_gguf
from tiny.parts import write_encoder
from voco_plugin.models import gguf
from voco_plugin.models.llms import load_llm, resolve_llm

IDS = torch.tensor([[258, 72, 101, 108, 108, 111]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf")
    write_gguf(path / "whole.gguf", llama())
    write_gguf(path / "eight_bits.gguf", llama(), "Q8_0")
    return path


@torch.no_grad()
def test_the_weights_are_those_that_were_written(folder):
    model, tokenizer, _ = load_llm(str(folder / "whole.gguf"))
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token is not None
    assert tokenizer("hi<image>").input_ids[-1] == tokenizer.convert_tokens_to_ids("<image>")


@torch.no_grad()
def test_packed_weights_are_unpacked(folder):
    model, _, _ = load_llm(str(folder / "eight_bits.gguf"), "bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    own = dict(llama().named_parameters())
    for name, weight in model.named_parameters():
        step = own[name].abs().amax() / 127  # of 8 bits, at most; and bf16's rounding
        assert (weight.float() - own[name]).abs().max() <= step / 2 + own[name].abs().max() / 256
    assert not hasattr(model.config, "quantization_config")


@torch.no_grad()
def test_composed_of_it_is_an_ordinary_checkpoint(folder, tmp_path):
    encoder = write_encoder(tmp_path / "encoder", "clip")
    model, processor = vp.compose(encoder, str(folder / "eight_bits.gguf"))
    assert "im_start" in processor.chat_template and model.config.composed_of["llm"] == "eight_bits.gguf"
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert "quantization_config" not in text and str(tmp_path) not in text
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    tools = AutoProcessor.from_pretrained(tmp_path / "saved")
    ids = tools.tokenizer("hello", return_tensors="pt").input_ids
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    tuned, _ = vp.load(tmp_path / "saved", voco=vp.VoCoConfig(num_tokens=1))
    assert vp.is_attached(tuned)


def test_one_inside_an_installed_package(folder, tmp_path, monkeypatch):
    package = tmp_path / "weights_of_it"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it is not to be run')")
    (package / "a.gguf").write_bytes((folder / "whole.gguf").read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_llm("package:weights_of_it").source == str(package / "a.gguf")
    assert "weights_of_it" not in sys.modules
    with pytest.raises(FileNotFoundError, match="package:not_there: no package of that name is installed"):
        resolve_llm("package:not_there")
    with pytest.raises(FileNotFoundError, match="the package json holds no GGUF file"):
        resolve_llm("package:json")
    (package / "a.gguf").rename(package / "a.gguf.part00")
    with pytest.raises(FileNotFoundError, match="no GGUF file, but a.gguf.part00: join the pieces into one"):
        resolve_llm("package:weights_of_it")
    for odd in ("package:", "package:a-b", "package:../x", "package:a.b"):
        with pytest.raises(FileNotFoundError, match="no package of that name"):
            resolve_llm(odd)


def test_what_is_meant_is_clear_or_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"holds 2 GGUF files \(eight_bits.gguf, whole.gguf\); give the path"
    ):
        resolve_llm(str(folder))
    with pytest.raises(FileNotFoundError, match="none.gguf does not exist"):
        resolve_llm(str(tmp_path / "none.gguf"))
    (tmp_path / "m-00001-of-00002.gguf").touch()
    with pytest.raises(ValueError, match="one piece of a model in several; join them first"):
        resolve_llm(str(tmp_path))
    with pytest.raises(ValueError, match="holds a language model alone. Compose it"):
        vp.load(str(folder / "whole.gguf"), voco=vp.VoCoConfig())


def test_without_the_package_that_reads_it_the_extra_is_named(folder, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        gguf.importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a)
    )
    with pytest.raises(ImportError, match=r"pip install 'voco_plugin\[gguf\]'"):
        vp.compose("clip_vit_l_14_336", str(folder / "whole.gguf"))


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00")
    with pytest.raises(ValueError, match="cut.gguf is no GGUF file that can be read"):
        load_llm(str(tmp_path / "cut.gguf"))
