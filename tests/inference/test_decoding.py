"""Generation at full strength on caches: static caches, assisted decoding, stop strings, processors; each
gives what the masked single pass gives.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import voco_plugin as vp
from contracts import decoding
from contracts.decoding import ONE, draft
from contracts.generation import NEW, single
from harness import RULES, attached, inputs, rows_for, shared
from tiny import NAMES
from voco_plugin.core.forward import active_rule


def windowed(model) -> bool:
    return vp.attachment(model).family.windowed(model)


@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, "isolated") for n in NAMES] + [("llava_llama", r) for r in RULES if r != "isolated"],
)
def test_a_static_cache_gives_the_same_answers_or_is_refused(name, rule):
    model = shared(name, rule=rule)
    batch = inputs(name, rows_for(rule), "left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    options = {"do_sample": False, "cache_implementation": "static"}
    if windowed(model) or rule == "hide-prefix" or name.startswith("paligemma"):
        with pytest.raises(ValueError, match="sliding or chunked|hide_prefix=True|prefix-LM"):
            model.generate(**stream, voco_cache=cache, **NEW, **options)
        return
    made = model.generate(**stream, voco_cache=cache, **NEW, **options)
    assert torch.equal(made[:, stream["input_ids"].shape[1] :], single(model, batch, do_sample=False))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 1.3},
        {"do_sample": False, "max_cache_len": 64},
    ],
    ids=["beams", "sample-return", "longer-cache"],
)
@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
def test_a_static_cache_decodes_every_way(name, options):
    model = shared(name)
    batch = inputs(name, side="left")
    reference = {k: v for k, v in options.items() if k != "max_cache_len"}
    torch.manual_seed(3)
    expected = single(model, batch, **reference)
    stream = model.stream_inputs(batch)
    torch.manual_seed(3)
    made = model.generate(
        **stream, voco_cache=model.compress(**batch), **NEW, **options, cache_implementation="static"
    )
    assert torch.equal(made[:, stream["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("how", ["draft", "lookup", "same"])
@pytest.mark.parametrize("name", ["llava_llama", "llava_mistral", "qwen2_5_vl", "gemma3", "idefics3"])
def test_assisted_decoding_gives_the_same_answers(name, how):
    decoding.assisted_decoding_gives_the_same_answers(name, how)


def test_a_draft_without_the_voco_row_is_named():
    model = shared("llava_llama")
    batch = inputs("llava_llama", ONE)
    rows = model.config.get_text_config().vocab_size
    with pytest.raises(ValueError, match=rf"has {rows - 1} token rows and this model {rows} .*resize_token"):
        model.generate(**batch, **NEW, assistant_model=draft(rows - 1))


def test_accepted_drafts_are_read_several_at_a_time(monkeypatch):
    """With a draft that is always right, the model runs fewer times than it answers tokens."""
    model = shared("llava_llama")
    batch = inputs("llava_llama", ONE, "left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    new = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(**stream, voco_cache=cache, **new)
    answer = expected[0, stream["input_ids"].shape[1] :]

    class Oracle(hf.generation.candidate_generator.CandidateGenerator):
        requires_model_outputs = False

        def __init__(self):
            self.calls = 0

        def get_candidates(self, ids):
            self.calls += 1
            done = ids.shape[1] - start
            return torch.cat([ids, answer[None, done : min(done + 4, 11)]], dim=1), None

        def update_candidate_strategy(self, *args):
            pass

    oracle = Oracle()
    start = model.stream_inputs(batch)["input_ids"].shape[1]  # slots of the blocks and text: the same number
    monkeypatch.setattr(type(model), "_get_candidate_generator", lambda self, **kwargs: oracle)
    made = model.generate(**stream, voco_cache=cache, **new, prompt_lookup_num_tokens=1)
    assert torch.equal(made, expected) and oracle.calls == 3


def test_stop_strings_and_processors_work_on_a_cache():
    from tiny.processors import processor

    model, tokenizer = shared("llava_llama"), processor("llava_llama").tokenizer
    batch = inputs("llava_llama", ONE, "left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    length = stream["input_ids"].shape[1]
    free = model.generate(**stream, voco_cache=cache, **NEW, do_sample=False)[0, length:]
    word = tokenizer.decode(free[2:3]).strip()
    assert word
    stopped = model.generate(
        **stream,
        voco_cache=cache,
        max_new_tokens=6,
        do_sample=False,
        stop_strings=[word],
        tokenizer=tokenizer,
    )[0, length:]
    first = next(i for i in range(6) if word in tokenizer.decode(free[: i + 1]))
    assert torch.equal(stopped, free[: first + 1]) and first < 5

    class Ban(hf.LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, free[0]] = -torch.inf
            return scores

    ban = {"logits_processor": hf.LogitsProcessorList([Ban()]), "do_sample": False}
    made = model.generate(**stream, voco_cache=cache, **NEW, **ban)[0, length:]
    assert free[0] not in made.tolist()
    assert torch.equal(made, single(model, batch, **ban)[0])


def test_decoding_on_settled_slots_needs_no_rule():
    """Without windows the mask is built under the rule once, for the prompt; with windows in every step."""
    for name, every_step in (("llava_llama", False), ("llava_mistral", True)):
        model = attached(name)
        batch = inputs(name, ONE, "left")
        cache, stream = model.compress(**batch), model.stream_inputs(batch)
        rules = []
        handle = model.get_decoder().register_forward_pre_hook(
            lambda *_, rules=rules: rules.append(active_rule() is not None)
        )
        model.generate(**stream, voco_cache=cache, **NEW, do_sample=False)
        handle.remove()
        assert rules == [True] + [every_step] * 5


def test_an_answer_follows_text():
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "t2", "img", "c2"]], "left")
    with pytest.raises(ValueError, match="a prompt ends with an image"):
        model.generate(**batch, **NEW)


def test_lengths_count_the_prompt_the_caller_gave():
    model = shared("llava_llama")
    batch = inputs("llava_llama", ONE)
    length = batch["input_ids"].shape[1]
    for options in (
        {"max_length": length + 3, "min_length": length + 3},
        {"generation_config": hf.GenerationConfig(max_length=length + 3, min_length=length + 3)},
        {"max_length": length + 3, "min_length": length + 3, "cache_implementation": "static"},
        {"max_length": length + 3, "min_length": length + 3, "prompt_lookup_num_tokens": 2},
    ):
        assert model.generate(**batch, **options, do_sample=False).shape[1] == length + 3, options


@pytest.mark.slow
def test_a_compiled_static_decode_gives_the_same_answers():
    model = attached("llava_llama")
    batch = inputs("llava_llama", side="left")
    expected = single(model, batch, do_sample=False)
    compiled = hf.CompileConfig(mode="default")
    compiled._compile_all_devices = True
    stream = model.stream_inputs(batch)
    torch._dynamo.reset()
    made = model.generate(
        **stream, voco_cache=model.compress(**batch), **NEW, do_sample=False, cache_implementation="static",
        compile_config=compiled,
    )  # fmt: skip
    assert torch.equal(made[:, stream["input_ids"].shape[1] :], expected)
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) > 0
