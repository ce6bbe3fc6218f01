"""The shipped chat templates: the text LLaVA-1.5 was tuned with, and a loss on the answers alone."""

from __future__ import annotations

import pytest
import torch

from test_vocabulary import pictures
from tiny import voco_id
from tiny.processors import processor
from voco_plugin import VoCoConfig, VoCoDataCollator, VoCoSFTConfig
from voco_plugin.training.config import TEMPLATES

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
]


@pytest.fixture
def its():
    made = processor("llava_llama")
    made.chat_template = (TEMPLATES / "vicuna_v1.jinja").read_text()
    return made


def test_vicuna_v1_is_the_conversation_of_llava(its):
    expected = f"<s>{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert its.apply_chat_template(TALK, tokenize=False) == expected
    asked = its.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert asked == expected.removesuffix(" Yes.</s>")


def test_the_loss_is_on_the_answers_alone(its):
    collate = VoCoDataCollator(
        its, assistant_only_loss=True, voco=VoCoConfig(num_tokens=2, token_id=voco_id("llava_llama"))
    )
    batch = collate([{"messages": TALK, "images": pictures(1)}])
    labels = batch["labels"][0]
    assert its.tokenizer.decode(labels[labels != -100]) == "A cat.</s>Yes.</s>"
    assert int((batch["input_ids"] == voco_id("llava_llama")).sum()) == 2
    assert torch.equal(labels[labels != -100], batch["input_ids"][0][labels != -100])


def test_a_bare_name_is_a_shipped_template(tmp_path):
    made = VoCoSFTConfig(str(tmp_path), chat_template_path="vicuna_v1")
    assert made.chat_template_path == str(TEMPLATES / "vicuna_v1.jinja")
    assert VoCoSFTConfig(str(tmp_path), chat_template_path="org/name").chat_template_path == "org/name"
