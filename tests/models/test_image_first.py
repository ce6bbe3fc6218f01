"""A prompt that begins with an image is said once; shipped templates put a token in front of it."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

import tiny
import voco_plugin as vp
from tiny import processors
from tiny.parts import write_encoder, write_llm
from trainers import rows, trainer
from voco_plugin.core.layout import SequenceLayout
from voco_plugin.models import image_first
from voco_plugin.models.image_first import begins_image, image_comes_first
from voco_plugin.models.llms import TEMPLATES

BARE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}</s>{% endfor %}"
)
SAID = "at the very start of a prompt"


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(image_first, "_SAID", set())


def bare(bos: bool = False):
    processor = processors.processor("llava_llama")
    processor.chat_template = "{{ bos_token }}" * bos + BARE
    if not bos:  # as Qwen's: none, and the tokenizer adds none
        processor.tokenizer = without_bos(processor.tokenizer)
    return processor


def without_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = None
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A")
    return tokenizer


@pytest.mark.parametrize("name", sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
@pytest.mark.parametrize("bos", [True, False])
def test_no_shipped_template_begins_with_an_image(name, bos):
    processor = bare(bos)
    ids = set(processor.tokenizer.convert_tokens_to_ids(["<image>", "<IMG_CONTEXT>", "<start_of_image>"]))
    assert image_comes_first(processor, ids) is not bos
    processor.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    assert "Q" in processor.apply_chat_template(question) or name == "llava_plain"
    assert not image_comes_first(processor, ids)


@pytest.mark.parametrize("name", processors.NAMES)
def test_nor_does_any_familys_here(name):
    try:
        processor = processors.processor(name)
    except ImportError as missing:
        pytest.skip(str(missing))
    collator = vp.VoCoDataCollator(processor, voco=vp.VoCoConfig(token="<unused0>"))
    assert not image_comes_first(processor, begins_image(collator.vocab))


def test_attaching_says_it_once(caplog):
    for _ in range(2):
        vp.attach(tiny.build("llava_llama"), vp.VoCoConfig(token="<v>"), bare())
    assert caplog.text.count(f"this chat template puts an image {SAID}") == 1


@pytest.mark.parametrize("voco", [{"rule": "causal"}, {"hide_prefix": True, "block_context": "prefix"}])
def test_not_where_text_sees_the_image_or_nothing_before_it_anyway(voco, caplog):
    vp.attach(tiny.build("llava_llama"), vp.VoCoConfig(token="<v>", **voco), bare())
    vp.attach(tiny.build("llava_llama"), vp.VoCoConfig(token="<v>"), bare(bos=True))
    assert SAID not in caplog.text


def test_composing_says_it(tmp_path, caplog):
    encoder, llm = write_encoder(tmp_path, "clip"), write_llm(tmp_path, "llama")
    from transformers import AutoTokenizer

    tokenizer = without_bos(AutoTokenizer.from_pretrained(llm))
    tokenizer.save_pretrained(llm)
    vp.compose(encoder, llm, chat_template="llava_plain")
    assert SAID not in caplog.text
    vp.compose(encoder, llm, chat_template=BARE)
    assert caplog.text.count(SAID) == 1


def test_training_says_it_of_the_rows(tmp_path, caplog):
    """Also of rows that are text already, which no template renders."""
    given = [
        {"text": "<image>what is it red</s>", "images": row["images"]} for row in rows() if row["images"]
    ]
    processor = bare()
    processor.chat_template = None
    made = trainer(
        tiny.build("llava_llama"), tmp_path, Dataset.from_list(given), processing_class=processor, max_steps=2
    )
    made.train()
    assert caplog.text.count(f"a row of the data has an image {SAID}") == 1


def test_a_layout_knows_whether_a_row_begins_with_an_image():
    vocab = vp.VoCoDataCollator(
        processors.processor("llava_llama"), voco=vp.VoCoConfig(token="<unused0>")
    ).vocab
    (image,) = vocab.placeholders
    for ids, expected in (([0, image, 5], True), ([0, 5, image], False), ([5, 5, 5], False)):
        mask = torch.tensor([[int(i != 0) for i in ids]])
        layout = SequenceLayout.from_ids(torch.tensor([ids]), mask, vocab, require_voco=False)
        assert layout.begins_with_image is expected
