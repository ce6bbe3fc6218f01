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


# -- what transformers' processors and criteria see of a prompt

UNEVEN = [["bos", "t3", "img@1", "c2", "t4"], ["bos", "t2", "img@2", "c2", "t3", "img@3", "c2", "t2"]]
OTHER_EOS = {"eos_token_id": 3}  # these rows' answers use the tokenizer's


def ways(model, batch, **more) -> list[torch.Tensor]:
    """New tokens of one pass, of both stages at once, and from a cache."""
    given, length = cached(model, batch), batch["input_ids"].shape[1]
    both = model.generate(**batch, **NEW, **more)[:, length:]
    from_cache = model.generate(**given, **NEW, **more)[:, given["input_ids"].shape[1] :]
    return [single(model, batch, **more), both, from_cache]


@pytest.mark.parametrize("kind", ["repetition", "ngram", "across an image", "beams", "static"])
def test_settings_that_read_the_prompt_read_that_of_the_caller(kind):
    """The penalty takes padding from the mask of all slots, and left out the first words of the row with one
    image; words on both sides of an image passed for an n-gram, and so did a head start's fillers.
    """
    model = attached("llava_llama")
    batch = inputs("llava_llama", UNEVEN, "left")
    more = {"repetition_penalty": 5.0, **OTHER_EOS}
    if kind == "ngram":
        more = {"repetition_penalty": 0.2, "no_repeat_ngram_size": 2, **OTHER_EOS}
    elif kind == "across an image":
        batch = inputs("llava_llama", [["bos", "t3", "img", "c2", "t1"]], "left")
        before, last = batch["input_ids"][0, 3].item(), batch["input_ids"][0, -1].item()
        more = {"sequence_bias": [[[before, last, int(single(model, batch)[0, 0])], -100.0]]}
    elif kind == "beams":
        more["num_beams"] = 3
    plain = single(model, batch, **OTHER_EOS)
    expected = single(model, batch, **more)
    assert kind == "across an image" or not torch.equal(plain, expected)
    if kind == "static":
        more["cache_implementation"] = "static"
        given = cached(model, batch)
        made = model.generate(**given, **NEW, **more)[:, given["input_ids"].shape[1] :]
        assert torch.equal(made, expected)
        return
    for made in ways(model, batch, **more):
        assert torch.equal(made, expected)


@pytest.mark.parametrize("from_cache", [False, True])
def test_processors_and_criteria_of_the_callers_see_the_prompt_that_it_gave(from_cache):
    model = attached("llava_llama")
    batch = inputs("llava_llama", UNEVEN, "left")
    given = cached(model, batch) if from_cache else batch
    length, seen = given["input_ids"].shape[1], []

    def note(ids, scores):
        seen.append(ids.clone())
        return scores

    def enough(ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= length + 3)

    processors = hf.LogitsProcessorList([note])
    more = {"logits_processor": processors, "stopping_criteria": [enough], "num_beams": 2}
    made = model.generate(**given, max_new_tokens=6, **more)
    assert torch.equal(seen[0][::2, :length], given["input_ids"])
    assert made.shape[1] == length + 3


# -- how arguments come


def test_settings_by_position_are_those_by_name():
    model = attached("llava_llama")
    batch = inputs("llava_llama", ROWS, "left")
    ids, rest = batch["input_ids"], {k: v for k, v in batch.items() if k != "input_ids"}
    config = hf.GenerationConfig(**NEW)
    for two_stage in (True, False):
        made = model.generate(ids, config, **rest, two_stage=two_stage)
        assert torch.equal(made[:, ids.shape[1] :], single(model, batch))
    with pytest.raises(TypeError, match="generation_config is given twice"):
        model.generate(ids, config, generation_config=config, **rest)


@pytest.mark.parametrize("two_stage", [True, False])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"image_token_sizes": torch.zeros(1)}, "not used by the model"),
        ({"position_ids": torch.zeros(2, 17, dtype=torch.long)}, "position_ids .* the isolation rule"),
        ({"inputs_embeds": torch.zeros(2, 17, 64)}, "inputs_embeds .* the isolation rule"),
        ({"inputs": torch.zeros(2, 17, dtype=torch.long)}, "given twice"),
        ({"token_healing": True}, "token_healing=True tokenizes"),
        ({"assistant_early_exit": 1}, "models of text alone"),
        ({"cache_implementation": "statc"}, "'statc'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_left_out_is_refused(more, message, two_stage):
    """Beside images, these were passed over without a word in two stages, or broke without a reason."""
    model = attached("llava_llama")
    batch = inputs("llava_llama", ROWS, "left")
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, **NEW, **more, two_stage=two_stage)


def test_a_single_pass_reads_its_prompt_whole():
    model = attached("llava_llama")
    batch = inputs("llava_llama", ROWS, "left")
    expected = single(model, batch)
    with pytest.raises(ValueError, match="prefill_chunk_size cuts the prompt"):
        single(model, batch, prefill_chunk_size=2)
    both = model.generate(**batch, **NEW, prefill_chunk_size=2)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(both, expected)
