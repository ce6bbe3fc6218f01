"""A long prompt of stage 2 is read in chunks: the same logits and tokens, in memory that does not grow with
the square of its text.
"""

from __future__ import annotations

import pytest
import torch

from contracts.generation import NEW
from harness import CORE, RULES, TOLERANCE, attached, inputs, rows_for, shared
from matrix import combined, quick_rule
from tiny import NAMES
from voco_plugin.cache.place.stage_two import place
from voco_plugin.inference import generate_from_blocks
from voco_plugin.inference.generate_from_blocks import prefill_chunk, read_placed

ROWS = [["bos", "t3", "img", "c2", "t7"], ["bos", "t2", "img", "c2", "t1", "img", "c1", "t5"], ["bos", "t9"]]


@pytest.fixture
def chunks(monkeypatch):
    """``chunks(3)``: three tokens at a time from here on; the texts of the forwards that were run."""

    def of(length: int) -> None:
        monkeypatch.setattr(generate_from_blocks, "_MASK_ELEMENTS", 0)
        monkeypatch.setattr(generate_from_blocks, "_SHORTEST_CHUNK", length)

    return of


def both_ways(name: str) -> bool:
    """Whether the family reads its prompt as a prefix, which is never cut."""
    return shared(name)._voco_attachment.family.prefix_lm


CASES = combined([(n, r) for n in NAMES for r in RULES if n in CORE or r == "isolated"], quick_rule)


@pytest.mark.parametrize(("name", "rule"), CASES)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_whole_prompt(name, rule, chunks):
    model = shared(name, rule=rule)
    batch = inputs(name, rows_for(rule, ROWS), side="left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    whole = model(**stream, voco_cache=cache, logits_to_keep=1).logits
    tokens = model.generate(**stream, voco_cache=cache, **NEW, do_sample=False)
    chunks(3)
    seen = lengths_read(model, lambda: model(**stream, voco_cache=cache, logits_to_keep=1).logits)
    if both_ways(name):
        assert len(seen.lengths) == 1
    else:
        assert len(seen.lengths) > 2 and max(seen.lengths) <= 3
    assert (seen.result - whole).abs().max() <= TOLERANCE[torch.float32]
    seen = lengths_read(model, lambda: model.generate(**stream, voco_cache=cache, **NEW, do_sample=False))
    assert torch.equal(seen.result, tokens) and (both_ways(name) or max(seen.lengths) <= 3)


class lengths_read:  # noqa: N801
    """What ``work()`` gives, and how many tokens each forward of the language model read."""

    def __init__(self, model, work):
        self.lengths: list[int] = []
        inner = model.get_decoder()
        hook = inner.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            self.result = work()
        finally:
            hook.remove()

    def _see(self, module, args, kwargs):
        given = kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if given is None else given
        self.lengths.append(given.shape[1])


@pytest.mark.parametrize("name", ["llava_llama", "llava_mistral", "qwen2_5_vl"])
@torch.no_grad()
def test_every_digit_that_double_precision_has(name, chunks):
    model = shared(name, dtype=torch.float64)
    batch = inputs(name, ROWS, side="left", dtype=torch.float64)
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    whole = model(**stream, voco_cache=cache, logits_to_keep=1).logits
    chunks(2)
    found = model(**stream, voco_cache=cache, logits_to_keep=1).logits
    assert (found - whole).abs().max() <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"max_length": 40},
        {"prefill_chunk_size": 100},
    ],
    ids=lambda options: next(iter(options)),
)
@torch.no_grad()
def test_ways_of_decoding_are_the_same_after_chunks(options, chunks):
    model = shared("llava_llama")
    rows = ROWS[1:2] if "prompt_lookup_num_tokens" in options else ROWS
    batch = inputs("llava_llama", rows, side="left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    told = {**({} if "max_length" in options else NEW), **options, "do_sample": False}
    expected = model.generate(**stream, voco_cache=cache, **told)
    chunks(3)
    seen = lengths_read(model, lambda: model.generate(**stream, voco_cache=cache, **told))
    assert torch.equal(seen.result, expected)
    whole = "prefill_chunk_size" in options  # what the caller asks for wins
    assert (seen.lengths[0] > 3) == whole


@torch.no_grad()
def test_a_prefix_and_what_follows_it_are_read_in_chunks(chunks):
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "t8", "img", "c2", "t6"]])
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    whole = model(**stream, voco_cache=cache, logits_to_keep=1).logits
    chunks(3)
    ids = stream["input_ids"]
    before = model.prefix_cache(ids[:, :6])
    found = model(input_ids=ids[:, 6:], voco_cache=cache, prefix_cache=before, logits_to_keep=1).logits
    assert (found - whole).abs().max() <= 1e-4 and before.get_seq_length() == 6
    every = model(**stream, voco_cache=cache).logits  # of every token: at once
    assert every.shape[1] == ids.shape[1] and (every[:, -1:] - whole).abs().max() <= 1e-4


@torch.no_grad()
def test_short_prompts_are_read_at_once_and_long_ones_in_bounded_masks():
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["bos", "img", "c2", "t6"]])
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    state = model._voco_attachment
    assert prefill_chunk(place(model, state, **stream, cache=cache)) is None
    long = torch.cat([stream["input_ids"], stream["input_ids"][:, -1:].expand(1, 9000)], dim=1)
    placed = place(model, state, long, None, cache)
    chunk = prefill_chunk(placed)
    assert chunk is not None and chunk * placed.attention_mask.shape[1] <= 1 << 25
    assert chunk > 1000, "but not so short that the KV cache is copied all the time"


@torch.no_grad()
def test_what_a_chunk_leaves_behind_is_what_the_whole_leaves(chunks):
    model = shared("llava_mistral")
    batch = inputs("llava_mistral", ROWS, side="left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    placed = [place(model, model._voco_attachment, **stream, cache=cache) for _ in range(2)]
    made = [
        read_placed(model._read, one, chunk, logits_to_keep=1).past_key_values
        for one, chunk in zip(placed, (None, 4), strict=True)
    ]
    assert made[0].get_seq_length() == made[1].get_seq_length()
    slots = [one.voco_slots for one in made]
    for field in ("kind", "block", "order"):
        assert torch.equal(getattr(slots[0].table, field), getattr(slots[1].table, field))
    assert torch.equal(slots[0].next_position, slots[1].next_position) and slots[1].planned is None


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v"])
@torch.no_grad()
def test_an_earlier_batch_of_another_size_leaves_nothing_behind(name):
    """Qwen-VL's and GLM's models keep their last prompt's position offsets, a row each."""
    model = attached(name)
    batch = inputs(name, ROWS, side="left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    logits = model(**stream, voco_cache=cache, logits_to_keep=1).logits
    tokens = model.generate(**stream, voco_cache=cache, **NEW, do_sample=False)
    model.generate(**inputs(name, side="left"), **NEW, do_sample=False, two_stage=False)  # four rows
    kept = model.base_model.rope_deltas
    assert len(kept) == 4
    assert torch.equal(model(**stream, voco_cache=cache, logits_to_keep=1).logits, logits)
    assert torch.equal(model.generate(**stream, voco_cache=cache, **NEW, do_sample=False), tokens)
    assert model.base_model.rope_deltas is kept, "a single pass may go on where it was"
