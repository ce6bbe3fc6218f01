"""The chat templates of the LLM presets: the conversation as documented, and a loss on the answers alone."""

from __future__ import annotations

import copy

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_talks import EXPECTED, TALK
from voco_plugin.models.answer_ends import AnswerEnd, answer_end
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


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("<|im_start|>", "chatml"), ("<|start_header_id|>", "llama3"), ("<start_of_turn>", "gemma"),
        ("<|im_sep|>", "phi4"), ("<|end|>", "phi3"), ("[INST]", "mistral"),
    ],
)  # fmt: skip
def test_a_vocabulary_says_the_conversation_where_no_template_does(tokenizer, caplog, token, name) -> None:
    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    made.add_special_tokens({"additional_special_tokens": [token]})
    assert fitting_template(made) == name
    assert f"{token} in its vocabulary: taking {name}" in caplog.text


@pytest.mark.parametrize("template", sorted(ANSWERS))
def test_what_a_template_ends_an_answer_with(tokenizer, template) -> None:
    made = copy.deepcopy(tokenizer)
    mark = "<" + ANSWERS[template].rpartition("<")[2]
    assert answer_end(made, template_text(template)).text == mark
    made.add_special_tokens({"additional_special_tokens": [mark, mark[:3]]})
    found = answer_end(made, template_text(template))
    assert found.token_id == made.convert_tokens_to_ids(mark) and found.text == mark


def test_a_template_that_ends_with_nothing_or_cannot_be_rendered(tokenizer) -> None:
    assert answer_end(tokenizer, template_text("llava_plain")) == AnswerEnd("", None)
    assert (
        answer_end(tokenizer, "{{ raise_exception('no') }}") is None and answer_end(tokenizer, None) is None
    )
