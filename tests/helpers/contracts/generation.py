"""What tests/…/test_generation.py holds, to be run on broken versions too."""

from __future__ import annotations

import torch

from harness import inputs, rows_for, shared

NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


def single(model, batch, **options):
    """The reference: one pass over everything, the vision tokens' keys kept and masked."""
    return model.generate(**batch, **NEW, two_stage=False, **options)[:, batch["input_ids"].shape[1] :]


def greedy_equals_single_pass(name, rule):
    model = shared(name, rule=rule)
    batch = inputs(name, rows_for(rule), "left")
    expected = single(model, batch, do_sample=False)
    both = model.generate(**batch, **NEW, do_sample=False)
    assert torch.equal(both[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    assert torch.equal(both[:, batch["input_ids"].shape[1] :], expected)
    stream = model.stream_inputs(batch)
    cached = model.generate(**stream, voco_cache=model.compress(**batch), **NEW, do_sample=False)
    assert torch.equal(cached[:, stream["input_ids"].shape[1] :], expected)


def the_given_cache_is_never_changed():
    model = shared("llava_llama")
    batch = inputs("llava_llama", side="left")
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    before = [t.clone() for b in cache for t in (*b.keys, *b.values)]
    outputs = [model.generate(**stream, voco_cache=cache, **NEW, num_beams=2) for _ in range(2)]
    assert torch.equal(*outputs)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (t for b in cache for t in (*b.keys, *b.values)), strict=True)
    )
