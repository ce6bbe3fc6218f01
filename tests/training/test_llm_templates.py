"""The chat templates of the LLM presets: the conversation as documented, and a loss on the answers alone."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_talks import EXPECTED, TALK
from voco_plugin.models.llms import TEMPLATES, fitting_template, template_text

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
