"""A generation's text comes as it grows, ends when it is left, and its error reaches who reads it."""

from __future__ import annotations

import threading

import pytest
import torch

from sessions import made
from voco_plugin.core.layout import tokenizer_of
from voco_plugin.serving.token_stream import TokenStream


@pytest.fixture(scope="module")
def parts():
    model, tools = made("llava_llama")
    inputs = tools.tokenizer("What is this?", return_tensors="pt")
    return model.eval(), tokenizer_of(tools), inputs


def generating(model, inputs, new: int, seen: list | None = None):
    def generate(**options):
        ids = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
        if seen is not None:
            seen.append(ids.shape[1] - inputs["input_ids"].shape[1])
        return ids

    return generate


def test_it_says_what_generate_says(parts):
    model, tokenizer, inputs = parts
    stream = TokenStream(tokenizer, generating(model, inputs, 12))
    texts = list(stream)
    ids = generating(model, inputs, 12)()
    assert (
        texts[-1]
        == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    )
    assert len(texts) > 1 and all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert torch.equal(stream.result, ids)
    assert 0 < stream.first_token_seconds < stream.seconds


def test_leaving_it_ends_the_generation(parts):
    model, tokenizer, inputs = parts
    lengths: list[int] = []
    stream = iter(TokenStream(tokenizer, generating(model, inputs, 400, lengths)))
    next(stream)
    stream.close()
    assert lengths and lengths[0] < 400
    assert not [t for t in threading.enumerate() if t.name == "voco-answer"]


def test_an_error_reaches_who_reads(parts):
    _, tokenizer, _ = parts

    def fails(**options):
        raise RuntimeError("out of memory")

    stream = TokenStream(tokenizer, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream)
    assert stream.first_token_seconds is None and stream.result is None


def test_an_answer_of_no_token(parts):
    model, tokenizer, inputs = parts

    def generate(streamer, stopping_criteria):
        streamer.put(inputs["input_ids"])
        return inputs["input_ids"]

    stream = TokenStream(tokenizer, generate)
    assert list(stream) == [] and stream.first_token_seconds is None
