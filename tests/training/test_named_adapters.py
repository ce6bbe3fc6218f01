"""A checkpoint loads by its path whatever its adapter is called, and holds every token that it was given."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import tiny
import voco_plugin as vp
from tiny import processors
from trainers import trainer

LORA = {"r": 4, "target_modules": r".*language_model.*q_proj", "init_lora_weights": "gaussian"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("named") / "base")
    tiny.build("llava_llama").save_pretrained(folder)
    processors.processor("llava_llama").save_pretrained(folder)
    return folder


def adapted(base, name):
    model, processor = vp.load(base, voco=vp.VoCoConfig(num_tokens=2))
    row = vp.attachment(model).vocab.voco_id
    config = LoraConfig(**LORA, trainable_token_indices=[row])
    return get_peft_model(model, config, adapter_name=name), processor


def run(model, processor, out, data, **options):
    options = {"peft": False, "voco": False, "processing_class": processor, **options}
    return trainer(model, out, data, **options)


@torch.no_grad()
def logits(model, made, data):
    batch = made.data_collator([data[0]])
    batch.pop("labels")
    return model.eval()(**batch).logits


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_folder_loads_by_its_path_and_resumes(base, data, tmp_path, name):
    model, processor = adapted(base, name)
    made = run(model, processor, tmp_path, data, save_strategy="steps", save_steps=2, max_steps=4)
    made.train()
    made.save_model()
    expected = logits(made.model, made, data)
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert torch.equal(logits(vp.load(str(folder))[0], made, data), expected)
        assert not (folder / name).exists()
        assert (folder / "adapter_model.safetensors").stat().st_size < 20_000  # rows, no embeddings
    again = run(*adapted(base, name), tmp_path, data, save_strategy="no", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.allclose(logits(again.model, again, data), expected, atol=1e-5)


def test_one_that_was_saved_by_hand_is_found_below(base, data, tmp_path):
    model, processor = adapted(base, "mine")
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    processor.save_pretrained(tmp_path)
    vp.attachment(model).save(tmp_path)
    made = run(model, processor, tmp_path / "run", data)
    assert torch.equal(logits(vp.load(str(tmp_path))[0], made, data), logits(model, made, data))
    model.add_adapter("other", LoraConfig(**LORA))
    with pytest.raises(ValueError, match="holds the adapters mine, other, and a checkpoint loads as one"):
        run(model, processor, tmp_path / "run", data)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the adapters mine, other; load one of them"):
        vp.load(str(tmp_path))


def added(model, processor, *tokens, rows=True):
    processor.tokenizer.add_tokens(list(tokens))
    if rows:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    return model, processor


@pytest.mark.parametrize("when", ["before", "after"])
def test_tokens_that_an_adapters_checkpoint_would_lose_are_refused(base, data, tmp_path, when):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(base)
    processor = AutoProcessor.from_pretrained(base)
    if when == "before":
        added(model, processor, "<mine>")
    vp.attach(model, vp.VoCoConfig(num_tokens=2), processor)
    if when == "after":
        added(model, processor, "<mine>")
    with pytest.raises(ValueError, match=r"the token '<mine>' \(id \d+\) was added to a base model of"):
        run(model, processor, tmp_path, data, peft=True)
    made = run(model, processor, tmp_path, data)  # full tuning saves every row
    made.train()
    made.save_model()
    loaded, _ = vp.load(str(tmp_path))
    assert torch.equal(logits(loaded, made, data), logits(made.model, made, data))
    number = processor.tokenizer.convert_tokens_to_ids("<mine>")
    assert torch.equal(
        loaded.get_input_embeddings().weight[number], made.model.get_input_embeddings().weight[number]
    )


def test_saved_with_the_base_they_are_kept(base, data, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(base), AutoProcessor.from_pretrained(base)
    added(model, processor, "<mine>")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    made = trainer(str(tmp_path / "base"), tmp_path / "run", data)
    made.train()
    made.save_model()
    loaded, _ = vp.load(str(tmp_path / "run"))
    assert isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded, made, data), logits(made.model, made, data))


def test_a_token_without_a_row_is_refused(base, data, tmp_path):
    model, processor = vp.load(base, voco=vp.VoCoConfig(num_tokens=2))
    added(model, processor, "<mine>", "<yours>", rows=False)
    rows = len(model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({rows + 2}\)"):
        run(model, processor, tmp_path, data)
