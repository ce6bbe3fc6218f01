"""The shipped chat templates: the text each family was tuned with, and a loss on the answers alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import trl

from llm_talks import EXPECTED
from random_pictures import pictures
from talks import TALK
from tiny import voco_id
from tiny.processors import processor
from voco_plugin import VoCoConfig, VoCoDataCollator, VoCoSFTConfig
from voco_plugin.training.chat_templates import TEMPLATES

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


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


FORMATS = {
    "llava_plain": ("llava_llama", "<s><image>A cat.\nYes.\n"),
    "llava_onevision": (
        "llava_onevision",
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n",
    ),
    "qwen3_vl": (
        "qwen3_vl",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n",
    ),
    "internvl": (
        "internvl",
        "<|im_start|>user\n<IMG_CONTEXT>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    ),
    "smolvlm": (
        "smolvlm",
        "<|im_start|>User:<image>What is it?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
        "User: Sure?<end_of_utterance>\nAssistant: Yes.<end_of_utterance>\n",
    ),
    "gemma3": (
        "gemma3",
        "<s><start_of_turn>user\n<start_of_image>What is it?<end_of_turn>\n"
        "<start_of_turn>model\nA cat.<end_of_turn>\n<start_of_turn>user\nSure?<end_of_turn>\n"
        "<start_of_turn>model\nYes.<end_of_turn>\n",
    ),
}
END = {"llava_plain": "\n", "smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>"}
AS_SHIPPED = {name: name for name in ("qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3")}
"""Templates whose original TRL carries, letter by letter as the checkpoints have it."""


def with_template(name: str):
    made = processor(FORMATS[name][0])
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return made


def test_every_shipped_template_is_tested():
    """Here, with the LLM presets', or (the original code's) with its conversion."""

    shipped = {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert shipped == {"vicuna_v1", "voco_v1", *FORMATS, *EXPECTED}


@pytest.mark.parametrize("name", FORMATS)
def test_a_template_writes_its_familys_format(name):
    made, expected = with_template(name), FORMATS[name][1]
    assert made.apply_chat_template(TALK, tokenize=False) == expected
    plain = [{"role": m["role"], "content": "".join(p.get("text", "") for p in m["content"])} for m in TALK]
    image = re.search(r"<image>\n?|<IMG_CONTEXT>\n|<start_of_image>|<\|vision_start.*?end\|>", expected)[0]
    if name not in ("llava_plain", "smolvlm"):  # they write no question; a space where no image follows
        assert made.apply_chat_template(plain, tokenize=False) == expected.replace(image, "")


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"llava_plain"}))
def test_what_is_trained_on_is_what_is_asked(name):
    made, expected = with_template(name), FORMATS[name][1]
    asked = made.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert expected.startswith(asked) and expected.removeprefix(asked).strip().startswith("Yes.")


@pytest.mark.parametrize("name", AS_SHIPPED)
def test_a_template_writes_what_the_checkpoints_own_writes(name):
    own = (Path(trl.__file__).parent / "chat_templates" / f"{AS_SHIPPED[name]}.jinja").read_text()
    made = with_template(name)
    image = {"type": "image"}
    two = [{"role": "user", "content": [image, {"type": "text", "text": "One "}, image]}, *TALK[1:]]
    late = [{"role": "user", "content": [{"type": "text", "text": "See"}, image]}, *TALK[1:]]
    system = [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, *TALK]
    for talk in (TALK, TALK[:1], TALK[2:], two, late, system):
        for prompt in (False, True):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            assert made.apply_chat_template(talk, **options) == made.apply_chat_template(
                talk, chat_template=own, **options
            )


@pytest.mark.parametrize("name", FORMATS)
def test_a_template_marks_exactly_the_answers(name):
    made, model = with_template(name), FORMATS[name][0]
    end = END.get(name, "<|im_end|>")
    config = VoCoConfig(num_tokens=2, token_id=voco_id(model))
    collate = VoCoDataCollator(made, assistant_only_loss=True, voco=config)
    batch = collate([{"messages": TALK, "images": pictures(1)}, {"messages": TALK[2:], "images": []}])
    spoken = [made.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    space = " " if name == "smolvlm" else ""
    assert spoken == [f"{space}A cat.{end}{space}Yes.{end}", f"{space}Yes.{end}"]
    assert int((batch["input_ids"] == voco_id(model)).sum()) == 2


@pytest.mark.parametrize("name", ["vicuna_v1"])
def test_the_first_word_of_an_answer_is_marked_where_a_token_begins_with_its_space(name):
    """Vicuna's tokenizer writes the space before a word into the word's token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<image>", *(f"▁{w}" for w in ("A", "cat.", "Yes.", "ASSISTANT:"))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in words[:4]])
    made = processor("llava_llama")
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.image_token_id = words.index("<image>")
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    out = made.apply_chat_template(
        TALK[2:], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, m in zip(out["input_ids"][0], out["assistant_masks"][0], strict=True) if m]
    assert made.tokenizer.convert_ids_to_tokens(marked) == ["▁Yes.", "</s>"]


def test_a_bare_name_is_a_shipped_template(tmp_path):
    made = VoCoSFTConfig(str(tmp_path), chat_template_path="vicuna_v1")
    assert made.chat_template_path == str(TEMPLATES / "vicuna_v1.jinja")


def test_a_file_is_taken_and_a_folder_that_has_one(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    file = str(tmp_path / "chat_template.jinja")
    for given in (file, str(tmp_path)):
        assert VoCoSFTConfig(str(tmp_path), chat_template_path=given).chat_template_path == file


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("{here}", "is a folder without a chat_template.jinja; give a file"),
        ("{here}/t.txt", "must end in .jinja"),
        ("vicuna_v2", r"neither a shipped template \(did you mean 'vicuna_v1'\?\) nor a file or folder here"),
        ("org/name", "nor a file or folder here; shipped: chatml, gemma"),
        ("{{ bos_token }}\n{{ messages }}", "is a template's text; write it to a file"),
    ],
)
def test_what_is_no_template_is_refused_before_anything_loads(tmp_path, given, why):
    (tmp_path / "t.txt").write_text("{{ messages }}")
    with pytest.raises(ValueError, match=why) as caught:
        VoCoSFTConfig(str(tmp_path), chat_template_path=given.replace("{here}", str(tmp_path)))
    assert "\n" not in str(caught.value)
