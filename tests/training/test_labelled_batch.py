"""What plug-ins of other trainers collate is `VoCoDataCollator`'s, token by token, and needs no TRL."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import voco_plugin as vp
from parity_reference import parted, rows
from tiny import processors
from trainers import picture
from voco_plugin.training import labelled_batch as module
from voco_plugin.training.chat_templates import TEMPLATES, training_template
from voco_plugin.training.labelled_batch import labelled_batch, prompt_batch

VOCO = vp.VoCoConfig(num_tokens=2, token="<unused0>")


def conversations(count: int) -> list:
    """Rows as parts with their images inside, and as `messages` with `images` beside."""
    made = []
    for row in rows()[:count]:
        images = [picture(number) for number in row["images"]]
        beside = {"messages": parted(row["messages"]), "images": images}
        inside, left = copy.deepcopy(beside["messages"]), list(images)
        for message in inside:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = left.pop(0)
        made.append((inside, beside))
    return made


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3"])
def test_ids_labels_and_pixels_are_those_of_our_collator(name: str) -> None:
    processor, made = processors.processor(name), conversations(6)
    plain = functools.partial(labelled_batch, processor=processor, template=training_template(processor))
    found = vp.wrap_collator(plain, VOCO, processor=processor)([inside for inside, _ in made])
    collator = vp.VoCoDataCollator(processor, voco=VOCO, assistant_only_loss=True)
    expected = collator([beside for _, beside in made])
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    learnt = found["labels"][1][found["labels"][1] != -100]
    assert "red" in processor.tokenizer.decode(learnt) and "what" not in processor.tokenizer.decode(learnt)


def test_a_content_of_text_is_a_part_of_text() -> None:
    """As TRL hands it to the template: some of them write parts alone."""
    processor = processors.processor("llava_llama")
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{% for p in m['content'] %}"
        "{{ p['text'] }}{% endfor %}{% endgeneration %}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
        "{% endfor %}"
    )
    turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": " red circle"}]
    batch = labelled_batch([turns], processor, template)
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(learnt) == " red circle"


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3"])
def test_answers_are_found_where_transformers_marks_them_wrongly(name: str, monkeypatch) -> None:
    """Before 5.18: by the same means on any version, so that this need not be run on the old one."""
    processor, made = processors.processor(name), [inside for inside, _ in conversations(6)]
    template = training_template(processor)
    monkeypatch.setattr(module, "answers_are_marked_wrongly", lambda: False)
    expected = labelled_batch(made, processor, template)
    monkeypatch.setattr(module, "answers_are_marked_wrongly", lambda: True)
    found = labelled_batch(made, processor, template)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_where_images_came_to_stand_must_be_known(monkeypatch) -> None:
    processor, ((inside, _),) = processors.processor("llava_llama"), conversations(1)
    monkeypatch.setattr(module, "answers_are_marked_wrongly", lambda: True)
    written = module._written
    silent = lambda *a, **k: {k: v for k, v in written(*a, **k).items() if "replacement" not in k}  # noqa: E731
    monkeypatch.setattr(module, "_written", silent)
    with pytest.raises(ValueError, match="does not say where images come to stand.*5.18 or later"):
        labelled_batch([inside], processor, training_template(processor))


def test_a_prompt_ends_where_the_answer_begins() -> None:
    processor = processors.processor("qwen2_5_vl")
    template = training_template(processor)
    ((inside, _),) = conversations(1)
    whole = labelled_batch([inside], processor, template)
    asked = prompt_batch([inside[:-1]], processor, template)["input_ids"][0]
    first = int((whole["labels"][0] != -100).nonzero()[0])
    assert torch.equal(asked, whole["input_ids"][0, :first])


def test_a_conversation_without_an_answer_is_refused() -> None:
    processor = processors.processor("llava_llama")
    asked = [{"role": "user", "content": "what"}]
    with pytest.raises(ValueError, match="conversation 0: no token of it has a label"):
        labelled_batch([asked], processor, training_template(processor))


def test_a_template_that_marks_no_answer_is_refused() -> None:
    processor = copy.copy(processors.processor("llava_llama"))
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"own chat template does not mark the answers.*vicuna_v1"):
        training_template(processor)
    assert training_template(processor, "vicuna_v1") == (TEMPLATES / "vicuna_v1.jinja").read_text()
    with pytest.raises(ValueError, match=r"'vicuna_v2' is neither .*did you mean 'vicuna_v1'"):
        training_template(processor, "vicuna_v2")
