"""Generation from caches: every way of decoding gives what the masked single pass gives; the cache stays as
it is.
"""

from __future__ import annotations

import pytest
import torch

import voco_plugin as vp
from contracts import generation
from contracts.generation import NEW, single
from harness import CORE, RULES, inputs, shared
from matrix import combined, quick_rule
from tiny import NAMES
from voco_plugin._compat import cache_names
from voco_plugin.core.forward import as_cache, cache_of


@pytest.mark.parametrize(
    ("name", "rule"),
    combined([(n, r) for n in NAMES for r in RULES if n in CORE or r == "isolated"], quick_rule),
)
def test_greedy_equals_single_pass(name, rule):
    generation.greedy_equals_single_pass(name, rule)


@pytest.mark.parametrize("name", ["llava_llama", "llava_mistral", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    ],
    ids=["beams", "beams-return", "sample-return", "top-k", "processors"],
)
def test_other_ways_of_decoding_equal_single_pass(name, options):
    model = shared(name)
    batch = inputs(name, side="left")
    torch.manual_seed(7)
    expected = single(model, batch, **options)
    torch.manual_seed(7)
    stream = model.stream_inputs(batch)
    made = model.generate(**stream, voco_cache=model.compress(**batch), **NEW, **options)
    assert made.shape[0] == 4 * options.get("num_return_sequences", 1)
    assert torch.equal(made[:, stream["input_ids"].shape[1] :], expected)


def test_the_given_cache_is_never_changed():
    generation.the_given_cache_is_never_changed()


def test_many_questions_on_one_image():
    """One row of blocks, a batch of prompts: each as if asked alone."""
    model = shared("llava_llama")
    image = inputs("llava_llama", [["bos", "img", "c2", "t2"]])
    cache = model.compress(**image)
    asks = [["bos", "img", "c2", f"t{n}"] for n in (2, 5, 3)]
    batch = model.stream_inputs(inputs("llava_llama", asks))
    together = model.generate(**batch, voco_cache=cache, **NEW, do_sample=False)[:, -6:]
    for row, ask in enumerate(asks):
        alone = model.stream_inputs(inputs("llava_llama", [ask], first_row=row))
        assert torch.equal(
            model.generate(**alone, voco_cache=cache, **NEW, do_sample=False)[0, -6:], together[row]
        )


def test_a_streamer_sees_the_new_tokens():
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.got.append("end")

    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "img", "c2", "t3"]])
    streamer = Collect()
    made = model.generate(**batch, **NEW, do_sample=False, streamer=streamer)
    assert [t[0] for t in streamer.got[1:-1]] == made[0, -6:].tolist() and streamer.got[-1] == "end"


def test_return_dict_and_scores():
    model = shared("llava_llama")
    batch = inputs("llava_llama", side="left")
    expected = model.generate(
        **batch, **NEW, two_stage=False, return_dict_in_generate=True, output_scores=True
    )
    made = model.generate(**batch, **NEW, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(made.sequences, expected.sequences)
    for a, b in zip(made.scores, expected.scores, strict=True):
        finite = torch.isfinite(b)
        assert torch.equal(finite, torch.isfinite(a)) and (a[finite] - b[finite]).abs().max() <= 1e-4


def test_max_length_counts_the_prompt_the_caller_gave():
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "img", "c2", "t3"]])
    length = batch["input_ids"].shape[1]
    assert model.generate(**batch, max_length=length + 3, min_new_tokens=3).shape[1] == length + 3


def test_prompts_without_images_generate_as_the_plain_model():
    from harness import plain

    batch = inputs("llava_llama", [["bos", "t5"], ["bos", "t2"]], "left")
    expected = plain("llava_llama").generate(**batch, **NEW, do_sample=False)
    assert torch.equal(shared("llava_llama").generate(**batch, **NEW, do_sample=False), expected)
    empty = shared("llava_llama").compress(**batch)
    assert torch.equal(
        shared("llava_llama").generate(**batch, voco_cache=empty, **NEW, do_sample=False)[:, -6:],
        expected[:, -6:],
    )


def test_voco_and_image_tokens_are_never_generated():
    model = shared("llava_tied")
    voco = [vp.attachment(model).vocab.voco_id, model.config.image_token_id]
    batch = inputs("llava_tied", side="left")
    made = model.generate(**batch, **NEW, return_dict_in_generate=True, output_scores=True)
    assert all((step[:, voco] == -torch.inf).all() for step in made.scores)


@pytest.mark.parametrize("name", ["llava_llama", "llava_mistral", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_a_conversation_goes_on_from_the_kv_cache(name):
    """Turn by turn on the KV cache of stage 2, and of a single pass, against everything at once."""
    model = shared(name)
    whole = inputs(name, [["bos", "t2", "img", "c2", "t9"]])
    logits = model(**whole).logits[0, -4:]
    cut = whole["input_ids"].shape[1] - 4
    stream = model.stream_inputs(whole)
    first = {k: v[:, :-4] for k, v in stream.items()}
    out = model(**first, voco_cache=model.compress(**whole), use_cache=True)
    tail = whole["input_ids"][:, -4:]
    for step in range(4):
        mask = torch.ones(1, cache_of(out).get_seq_length() + 1, dtype=torch.long)
        out = model(input_ids=tail[:, step : step + 1], attention_mask=mask, **as_cache(cache_of(out)))
        assert (out.logits[0, -1] - logits[step]).abs().max() <= 1e-4
    per_token = {
        k: v[:, :cut] if v.dim() == 2 and v.shape == whole["input_ids"].shape else v for k, v in whole.items()
    }
    out = model(**per_token, use_cache=True)
    out = model(
        input_ids=tail,
        attention_mask=torch.ones(1, cut + 4, dtype=torch.long),
        **as_cache(cache_of(out)),
    )
    assert (out.logits[0] - logits).abs().max() <= 1e-4


@torch.no_grad()
def test_a_second_image_in_a_later_turn():
    """Single pass, turn by turn: the second image's block must not see the first, nor the text see its
    pixels.
    """
    model = shared("llava_llama")
    whole = inputs("llava_llama", [["bos", "t2", "img", "c2", "t3", "img", "c2", "t3"]])
    logits = model(**whole).logits[0]
    cut = 1 + 2 + 9 + 2 + 3
    out = model(
        input_ids=whole["input_ids"][:, :cut],
        attention_mask=whole["attention_mask"][:, :cut],
        pixel_values=whole["pixel_values"][:1],
        use_cache=True,
    )
    out = model(
        input_ids=whole["input_ids"][:, cut:],
        attention_mask=whole["attention_mask"],
        pixel_values=whole["pixel_values"][1:],
        **as_cache(cache_of(out)),
    )
    assert (out.logits[0] - logits[cut:]).abs().max() <= 1e-4


@torch.no_grad()
def test_loss_of_stage_two_equals_the_single_pass():
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "img", "c2", "t5"], ["bos", "t1", "img", "c1", "t4"]], "left")
    labels = batch["input_ids"].clone()
    keep = slice(-3, None)
    masked = torch.full_like(labels, -100)
    masked[:, keep] = labels[:, keep]
    expected = model(**batch, labels=masked).loss
    stream = model.stream_inputs(batch)
    own = torch.full_like(stream["input_ids"], -100)
    own[:, keep] = stream["input_ids"][:, keep]
    loss = model(**stream, voco_cache=model.compress(**batch), labels=own).loss
    assert torch.isfinite(loss) and abs(float(loss - expected)) <= 1e-5


@torch.no_grad()
def test_rows_of_voco_tokens_are_nan_not_a_guess():
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "img", "c2", "t3"]])
    stream = model.stream_inputs(batch)
    logits = model(**stream, voco_cache=model.compress(**batch)).logits
    voco = stream["input_ids"][0] == vp.attachment(model).vocab.voco_id
    assert logits.shape[:2] == stream["input_ids"].shape
    assert logits[0, voco].isnan().all() and not logits[0, ~voco].isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "static", "two_stage": False}, "cache_implementation='static'"),
        *[({name: "x"}, f"{name} cannot be given together") for name in cache_names()],
    ],
)
def test_what_cannot_honour_the_rule_is_refused(options, message):
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "img", "c2", "t3"]])
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    with pytest.raises(ValueError, match=message):
        if not options.keys().isdisjoint(cache_names()):
            with pytest.raises(ValueError, match=message):
                model(**stream, voco_cache=cache, **options)
            model.generate(**stream, voco_cache=cache, **NEW, **options)
        elif "two_stage" in options:
            model.generate(**batch, **NEW, **options)
        else:
            model.generate(**stream, voco_cache=cache, **NEW, **options)


def test_compress_asks_for_k():
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "img", "c2", "t3"]])
    assert model.compress(**batch, num_tokens=2).num_tokens == [2]
    assert model.compress(**batch, num_tokens=4).num_tokens == [4]  # more in tests/cache/test_elastic.py
    with pytest.raises(ValueError, match="num_tokens=0 must be an integer of at least 1"):
        model.compress(**batch, num_tokens=0)
