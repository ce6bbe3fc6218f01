"""A model stops where the template that it was tuned with ends an answer, trained whole or by an adapter."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

import tiny
import voco_plugin as vp
from tiny import processors
from trainers import trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("ends") / "base")
    tiny.build("llava_llama").save_pretrained(folder)
    processors.processor("llava_llama").save_pretrained(folder)
    return folder


def stops(model) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


@pytest.mark.parametrize("peft", [True, False])
def test_the_saved_model_stops_there(base, data, tmp_path, peft, caplog):
    made = trainer(base, tmp_path, data, peft=peft, chat_template_path="chatml", max_steps=1)
    assert "ends an answer with '<|im_end|>': added to the tokens at which" in caplog.text
    made.train()
    made.save_model()
    model, processor = vp.load(str(tmp_path))
    known = processor.tokenizer.get_vocab()
    assert stops(model) == [known["</s>"], known["<|im_end|>"]]
    if not peft:
        assert stops_of(tmp_path) == stops(model)


def stops_of(folder) -> list[int]:
    return GenerationConfig.from_pretrained(folder).eos_token_id


def test_a_template_with_the_models_own_end_changes_nothing(base, data, tmp_path, caplog):
    made = trainer(base, tmp_path, data, chat_template_path="vicuna_v1")
    assert stops(made.model) == [made.processing_class.tokenizer.eos_token_id] and "stops" not in caplog.text


@pytest.mark.parametrize(
    ("template", "said"),
    [("phi3", "'<|end|>', which is no token of this tokenizer"), ("llava_plain", "no token")],
)
def test_an_end_that_nothing_stops_at_is_said(base, data, tmp_path, template, said, caplog):
    trainer(base, tmp_path, data, chat_template_path=template)
    assert f"ends an answer with {said}, so a model tuned with it does not learn to stop" in caplog.text


def test_aligning_a_projector_teaches_no_end(base, data, tmp_path, caplog):
    only = {"train_language": False, "train_voco": False, "train_projector": True}
    trainer(base, tmp_path, data, peft=False, chat_template_path="llava_plain", **only)
    assert "learn to stop" not in caplog.text
