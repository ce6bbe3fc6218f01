"""The chat templates of the LLM presets: the conversation as documented, and a loss on the answers alone."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from voco_plugin.models.llms import TEMPLATES, fitting_template, template_text

TALK = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s>"
    "<s>[INST] Sure? [/INST] Yes. </s>",
    "mistral": "<s>[INST] <image>\nWhat is it?[/INST] A cat.</s>[INST] Be brief.\n\nSure?[/INST] Yes.</s>",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\n<image>\nWhat is it?<end_of_turn>\n"
    "<start_of_turn>model\nA cat.<end_of_turn>\n<start_of_turn>user\nSure?<end_of_turn>\n"
    "<start_of_turn>model\nYes.<end_of_turn>\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\n<image>\nWhat is it?<|end|>\n"
    "<|assistant|>\nA cat.<|end|>\n<|user|>\nSure?<|end|>\n<|assistant|>\nYes.<|end|>\n",
    "phi4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|><image>\nWhat is it?"
    "<|im_end|><|im_start|>assistant<|im_sep|>A cat.<|im_end|><|im_start|>user<|im_sep|>Sure?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Yes.<|im_end|>",
    "vicuna_v1": "<s>Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
    "USER: Sure? ASSISTANT: Yes.</s>",
}  # fmt: skip
ANSWERS = {
    "chatml": "A cat.<|im_end|>Yes.<|im_end|>",
    "llama3": "A cat.<|eot_id|>Yes.<|eot_id|>",
    "llama2": " A cat. </s> Yes. </s>",
    "mistral": " A cat.</s> Yes.</s>",
    "gemma": "A cat.<end_of_turn>Yes.<end_of_turn>",
    "phi3": "A cat.<|end|>Yes.<|end|>",
    "phi4": "A cat.<|im_end|>Yes.<|im_end|>",
    "vicuna_v1": "A cat.</s>Yes.</s>",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: offsets say which characters are marked."""
    characters = sorted({c for text in EXPECTED.values() for c in text})
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    made.bos_token, made.eos_token = "<s>", "</s>"
    return made


def test_every_template_of_a_preset_is_here() -> None:
    assert set(EXPECTED) == set(ANSWERS) <= {p.stem for p in TEMPLATES.glob("*.jinja")}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_writes_the_conversation_and_marks_the_answers(tokenizer, name) -> None:
    template = template_text(name)
    text = tokenizer.apply_chat_template(TALK, chat_template=template, tokenize=False)
    assert text == EXPECTED[name]
    asked = tokenizer.apply_chat_template(
        TALK[:4], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(asked) and text[len(asked) :].lstrip().startswith("Yes.")
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template(
        [TALK], chat_template=template, return_assistant_tokens_mask=True, bos_token="<s>", eos_token="</s>"
    )
    assert rendered[0] == text
    assert "".join(text[a:b] for a, b in spans[0]) == ANSWERS[name]


@pytest.mark.parametrize("name", [n for n in EXPECTED if n != "llama2"])
def test_a_tokenizers_own_template_finds_its_match(tokenizer, name) -> None:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    assert fitting_template(tokenizer) == name


def test_a_conversation_nobody_knows_is_said(tokenizer, caplog) -> None:
    tokenizer.chat_template = "{{ messages }}"
    assert fitting_template(tokenizer) == "vicuna_v1" and "none that is known" in caplog.text
    with pytest.raises(ValueError, match="'chatm' is neither a shipped template .did you mean 'chatml'"):
        template_text("chatm")
