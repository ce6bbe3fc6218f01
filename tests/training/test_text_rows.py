"""Rows of text alone, for models of text and for VLMs: as TRL's own trainer takes them."""

from __future__ import annotations

import pytest
import transformers as hf
from datasets import Dataset, DatasetDict

from tiny.vocab import tokenizer
from trainers import losses, trainer
from voco_plugin.training.datasets import prepare_dataset

TURNS = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "red"}]
STRINGS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
"""Templates of text models know strings, no parts."""


def test_a_model_of_text_trains_on_conversations(tmp_path):
    """They became typed parts, on which such a template ends in a TypeError."""
    words = tokenizer()
    words.chat_template = STRINGS
    text = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = hf.Qwen2Config(**text, num_attention_heads=2, num_key_value_heads=2)
    data = Dataset.from_dict({"conversations": [TURNS] * 4})
    made = trainer(
        hf.Qwen2ForCausalLM(config),
        "unused",
        data,
        peft=False,
        voco=False,
        processing_class=words,
        max_steps=1,
    )
    made.train()
    assert losses(made)[0] > 0
    assert words.decode(made.train_dataset[0]["input_ids"]).startswith("user: what is it\nassistant: red")


def test_an_image_without_a_column_is_named():
    rows = [TURNS, [{"from": "human", "value": "<image>\nwhat"}, TURNS[1]]]
    with pytest.raises(ValueError, match="train_dataset, row 1 has an <image> and the dataset no column"):
        prepare_dataset(Dataset.from_dict({"conversations": rows}), need_images=False)


@pytest.mark.parametrize(("column", "row"), [("text", "what is it"), ("conversations", TURNS)])
def test_only_a_template_that_is_used_says_where_generation_stops(tmp_path, column, row):
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    words.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{{ m['content'][0]['text'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    config = hf.Qwen2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model, data = hf.Qwen2ForCausalLM(config), Dataset.from_dict({column: [row] * 4})
    made = trainer(model, "unused", data, peft=False, voco=False, processing_class=words, max_steps=1)
    stops = made.model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else stops or []
    assert (words.get_vocab()["<|im_end|>"] in stops) == (column == "conversations")


def test_a_dict_of_sets_is_refused_as_trl_refuses_it(tmp_path):
    data = DatasetDict({"train": Dataset.from_dict({"text": ["what is it"] * 4})})
    config = hf.Qwen2Config(vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = hf.Qwen2ForCausalLM(config)
    with pytest.raises(TypeError, match="DatasetDict"):
        trainer(model, "unused", data, peft=False, voco=False, processing_class=tokenizer(), max_steps=1)
