"""Generation settings that come another way than tests give them: saved in a config, given as an object, or
meant for another kind of model. The answer is that of one pass, or a refusal.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import voco_plugin as vp
from contracts.generation import NEW, single
from harness import attached, inputs
from sessions import made
from tiny import processors

NAMES = ("llava_llama", "qwen2_5_vl", "gemma3", "paligemma")
ROWS = [["bos", "t3", "img", "c2", "t4"], ["bos", "t2", "img", "c2", "t3"]]


def cached(model, batch) -> dict:
    return {**model.stream_inputs(batch), "voco_cache": model.compress(**batch)}


# -- use_cache


@pytest.mark.parametrize("where", ["argument", "generation config", "given config", "config"])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_in_a_cache_whatever_a_config_says_of_caches(name, where):
    model = attached(name)
    batch = inputs(name, ROWS, "left")
    expected, given = single(model, batch), cached(model, batch)
    more = {}
    if where == "argument":
        more["use_cache"] = False
    elif where == "generation config":
        model.generation_config.use_cache = False
    elif where == "given config":
        more["generation_config"] = hf.GenerationConfig(use_cache=False)
    else:
        model.config.use_cache = model.config.get_text_config().use_cache = False
    made = model.generate(**given, **NEW, **more)
    length = given["input_ids"].shape[1]
    assert torch.equal(made[:, length:], expected)
    assert torch.equal(model.generate(**batch, **NEW, **more)[:, batch["input_ids"].shape[1] :], expected)


# -- padding


def even() -> dict[str, torch.Tensor]:
    """Two rows of one length, with one image and with two: no more of one length with VoCo tokens."""
    one = inputs("llava_llama", [["bos", "img", "t3"]])["input_ids"]
    two = inputs("llava_llama", [["bos", "img", "t1", "img", "t1"]])["input_ids"]
    text = one[:, -1:].expand(1, two.shape[1] - one.shape[1])
    ids = torch.cat([torch.cat([one, text], dim=1), two])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(("side", "padded"), [("left", 0), ("right", -1)])
def test_rows_of_one_length_are_padded_as_asked_or_on_the_processors_side(side, padded):
    model = attached("llava_llama")
    asked = model.insert_voco_tokens(even(), 2, padding_side=side)["attention_mask"]
    assert not asked[:, padded].all() and asked[:, -1 - padded].all()
    its = processors.processor("llava_llama")
    its.tokenizer.padding_side = side
    vp.attachment(model).processor = its
    assert torch.equal(model.insert_voco_tokens(even(), 2)["attention_mask"], asked)


def test_where_nothing_says_on_which_side_it_is_asked_for():
    model = attached("llava_llama")
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.insert_voco_tokens(even(), 2)
    alone = {name: value[:1] for name, value in even().items()}
    assert model.insert_voco_tokens(alone, 2)["attention_mask"].all()  # one row needs no side


def test_what_is_padded_keeps_its_side():
    model = attached("llava_llama")
    for side, column in (("left", 0), ("right", -1)):
        batch = inputs("llava_llama", [["bos", "img", "t3"], ["bos", "t1"]], side)
        mask = model.insert_voco_tokens(batch, 2)["attention_mask"]
        assert not mask[1, column] and mask[1, -1 - column]


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_prompts_padded_on_the_right_are_not_answered_in_one_pass(name):
    model = attached(name)
    batch = inputs(name, [["bos", "t3", "img", "c2", "t4"], ["bos", "t2", "img", "c1", "t1"]], "right")
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(**batch, **NEW, two_stage=False)


# -- what stands in a config


def test_voco_and_image_tokens_are_kept_out_and_the_users_settings_hold(caplog):
    model = attached("llava_llama")
    batch = inputs("llava_llama", ROWS, "left")
    expected, given = single(model, batch), cached(model, batch)
    first = int(expected[0, 0])
    config = hf.GenerationConfig(max_new_tokens=NEW["max_new_tokens"], do_sample=False, top_k=1)
    hf.utils.logging.enable_propagation()
    try:
        made = model.generate(**given, generation_config=config)
    finally:
        hf.utils.logging.disable_propagation()
    assert not [r for r in caplog.records if "deprecated" in r.getMessage()]
    assert config.suppress_tokens is None, "the caller's is as it was"
    assert made[:, given["input_ids"].shape[1] :].shape[1] == NEW["max_new_tokens"]
    model.generate(**given, **{**NEW, "do_sample": True}, top_k=1)  # what is kept out is so before the cut
    banned = model.generate(**given, **NEW, suppress_tokens=[first])[0, given["input_ids"].shape[1] :]
    assert first not in banned.tolist()
    vocab = vp.attachment(model).vocab
    loud = hf.LogitsProcessorList([Favours(sorted({vocab.voco_id, *vocab.placeholders}))])
    made = model.generate(**given, **NEW, logits_processor=loud)[:, given["input_ids"].shape[1] :]
    assert not set(made.flatten().tolist()) & {vocab.voco_id, *vocab.placeholders}


class Favours(hf.LogitsProcessor):
    def __init__(self, ids) -> None:
        self.ids = ids

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.ids] += 100
        return scores


@pytest.mark.parametrize("where", ["argument", "given config", "model"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_kind_of_cache_may_stand_anywhere(kind, where):
    model = attached("llava_llama")
    batch = inputs("llava_llama", ROWS, "left")
    expected, given = single(model, batch), cached(model, batch)
    more = {}
    if where == "argument":
        more["cache_implementation"] = kind
    elif where == "given config":
        more["generation_config"] = hf.GenerationConfig(cache_implementation=kind)
    else:
        model.generation_config.cache_implementation = kind
    made = model.generate(**given, **NEW, **more)[:, given["input_ids"].shape[1] :]
    assert torch.equal(made, expected)


def test_a_models_own_max_length_counts_the_prompt_that_the_caller_sees():
    model = attached("llava_llama")
    batch = inputs("llava_llama", ROWS[:1], "left")
    given = cached(model, batch)
    for ask in (batch, given):
        length = ask["input_ids"].shape[1]
        model.generation_config.max_length = length + 3
        model.generation_config.min_length = length + 3
        assert model.generate(**ask, do_sample=False).shape[1] == length + 3


def test_continuous_batching_is_refused():
    model = attached("llava_llama")
    for ask in (
        lambda: model.init_continuous_batching(),
        lambda: model.generate_batch([[1, 5, 6]], generation_config=hf.GenerationConfig(max_new_tokens=2)),
    ):
        with pytest.raises(ValueError, match="continuous batching"):
            ask()


# -- messages


def test_a_prompt_for_another_k_says_so():
    model = attached("llava_llama")
    batch = inputs("llava_llama", ROWS[:1], "left")
    given = cached(model, batch)
    with pytest.raises(ValueError, match="2 VoCo tokens stand together and the cache holds blocks of K=1"):
        model.generate(**{**given, "voco_cache": given["voco_cache"].first(1)}, **NEW)


def test_a_prompt_past_the_models_length_is_warned_of_once(caplog):
    model = attached("llava_llama")
    batch = inputs("llava_llama", ROWS[:1], "left")
    given = cached(model, batch)
    model.get_decoder().config.max_position_embeddings = 4
    hf.utils.logging.enable_propagation()
    try:
        for _ in range(2):
            model(**given)
    finally:
        hf.utils.logging.disable_propagation()
    assert len([r for r in caplog.records if "trained up to 4" in r.getMessage()]) == 1


def test_a_session_says_what_is_its_own_to_decide():
    session = vp.VoCoSession(*made("llava_llama"))
    with pytest.raises(ValueError, match="return_dict_in_generate is the session's to decide"):
        session.ask("what?", return_dict_in_generate=True)
