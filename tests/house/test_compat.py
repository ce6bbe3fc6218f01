"""What ``_compat`` says of the installed libraries: the KV cache's name, Llama 4's output, torch's count of
FLOPs.
"""

from __future__ import annotations

import inspect
import logging
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, LlavaForConditionalGeneration

import tiny
import voco_plugin as vp
from harness import inputs, plain, shared, vocabulary
from sessions import made, pictures
from tiny import voco_id
from voco_plugin import _compat
from voco_plugin.benchmark import serving, shapes
from voco_plugin.benchmark.inference import first_token_ways
from voco_plugin.benchmark.timing import flops
from voco_plugin.core import forward

ROW = [["bos", "t3", "img", "c2", "t4"]]
NEW = {"max_new_tokens": 3, "do_sample": False}


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    """Every warning and every message of transformers' log, those it says only once included."""
    from transformers.utils import logging as their_logging

    for once in ("warning_once", "info_once"):
        getattr(their_logging, once).cache_clear()
    handler = _Heard()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lambda: [*handler.messages, *(str(warning.message) for warning in caught)]
    finally:
        logger.removeHandler(handler)


def about_names(messages):
    return [m for m in messages if "past_key_values" in m or "deprecated" in m]


def two_stages(model, name):
    batch = inputs(name, ROW)
    stream, cache = model.stream_inputs(batch), model.compress(**batch)
    model(**batch, use_cache=True)
    model(**stream, voco_cache=cache)
    before = {k: v[:, :4] for k, v in stream.items()}
    model.prefix_cache(before["input_ids"])
    for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        if name != "llava_llama" and more.get("cache_implementation"):
            continue  # windows: refused
        model.generate(**stream, voco_cache=cache, return_dict_in_generate=True, **NEW, **more)
    model.generate(**batch, **NEW)
    model.generate(**batch, **NEW, two_stage=False)
    moved = inputs(name, [["bos", "t5", "img", "c2", "t2"]])
    model(**model.stream_inputs(moved), voco_cache=cache)


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3", "llama4"])
@torch.no_grad()
def test_no_call_of_ours_uses_a_name_that_is_going(name, heard):
    """A model of its own: that the blocks of another model turn is looked up once."""
    model = plain(name)
    config = vp.VoCoConfig(token_id=voco_id(name), attention="dense")
    vp.attach(model, config, vocabulary=vocabulary(name, model, config))
    if name == "llama4":  # its blocks move by whole chunks
        batch = inputs(name, ROW)
        model(**model.stream_inputs(batch), voco_cache=model.compress(**batch))
        model.generate(**batch, **NEW)
    else:
        two_stages(model, name)
    assert about_names(heard()) == []


@torch.no_grad()
def test_nor_does_a_session_or_a_bench(heard):
    conversation = vp.VoCoSession(*made("llava_llama"))
    conversation.add(*pictures(1))
    conversation.ask("What is this?", max_new_tokens=3)
    conversation.ask("And this?", max_new_tokens=3)
    both = shapes.pair(shapes.build("tiny"))
    ways, _ = first_token_ways(*both, text=8, num_tokens=2, rows=1)
    for way in ways.values():
        way()()
    serving.decode(*both, text=8, num_tokens=2, rows={"floor": 1, "VoCo": 1}, steps=2, repeats=1)
    assert about_names(heard()) == []


def test_the_name_is_the_models_own():
    """The name stands in the signatures of the models, and what the output is read by in the outputs."""
    own = _compat.cache_names()[0]
    assert own in inspect.signature(LlavaForConditionalGeneration.forward).parameters
    past = DynamicCache()
    assert forward.as_cache(past) == {own: past} and forward.given_cache({own: past}) is past
    assert forward.given_cache({own: None}) is None and forward.given_cache({}) is None
    assert forward.cache_of((torch.zeros(1), past)) is None  # a tuple names nothing


@pytest.mark.parametrize("keyword", _compat.cache_names())
@torch.no_grad()
def test_a_caller_may_use_every_name_the_library_takes(keyword):
    """The rule goes on from a KV cache given under the old name too, as under the new one."""
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "t2", "img", "c2", "t5"]])
    logits = model(**batch).logits[0, -2:]
    head = {k: v[:, :-2] if v.dim() == 2 else v for k, v in batch.items()}
    past = forward.cache_of(model(**head, use_cache=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # theirs, for the caller
        out = model(
            input_ids=batch["input_ids"][:, -2:], attention_mask=batch["attention_mask"], **{keyword: past}
        )
        assert (out.logits[0] - logits).abs().max() <= 1e-5
        past.crop(-1)
        ids = model.generate(**{k: v for k, v in batch.items() if v.dim() == 2}, **{keyword: past}, **NEW)
    assert torch.equal(ids, model.generate(**batch, **NEW, two_stage=False))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_is_counted(masked):
    """Two products of the queries with the keys and back, and five in the backward, as on a GPU."""
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k, v = (torch.randn(2, 4, 10, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(6, 10) < 2 if masked else None
    forward = flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    product = 2 * (2 * 4) * 6 * 10 * 8
    assert forward == 2 * product
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert flops(lambda: out.sum().backward()) == 5 * product


@torch.no_grad()
def test_llama4_runs_attached_whatever_upstream_forgot():
    """``attach`` alone sees to it, ``detach`` gives the language model its own class back."""
    model = tiny.models.load_class("llama4").from_config(tiny.models.config("llama4"), dtype=torch.float32)
    model.eval()
    own = type(model.language_model)
    config = vp.VoCoConfig(token_id=voco_id("llama4"), attention="dense")
    vp.attach(model, config, vocabulary=vocabulary("llama4", model, config))
    assert model(**inputs("llama4", ROW)).logits.isfinite().all()
    broken = type(model.language_model) is not own
    assert broken == (transformers.__version__ == "5.24.0")
    vp.detach(model)
    assert type(model.language_model) is own
    text = inputs("llama4", [["bos", "t4"]])
    if broken:
        with pytest.raises(AttributeError, match="image_outputs"):
            model(**text)
    else:
        model(**text)
