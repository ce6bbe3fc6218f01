"""What tests/cache/test_placing.py holds; run on broken versions too."""

from __future__ import annotations

import random

import pytest
import torch

import voco_plugin as vp
from harness import (
    TOLERANCE,
    inputs,
    largest_difference,
    rows_for,
    shared,
    stream_columns,
    text_columns,
)
from tiny import image_sizes

NUM_IMAGES = 4


KS = (2, 1, 3, 2)


def prompt(name, order, texts, rule="isolated"):
    """A row that shows the images ``order`` with ``texts`` tokens before each and after the last."""
    specs, sizes = ["bos"], image_sizes(name)
    for number, image in enumerate(order):
        size = sizes[image % len(sizes)]
        shown = f"img:{size}@{image}" if size else f"img@{image}"
        specs += [f"t{texts[number]}"] * bool(texts[number]) + [shown, f"c{KS[image]}"]
    return [rows_for(rule, [[*specs, f"t{max(texts[-1], 1)}"]])[0]]


def compressed_apart(name, model, rule="isolated"):
    """Each image in a cache of its own, made in a prompt of its own."""
    caches = []
    for image in range(NUM_IMAGES):
        alone = prompt(name, [image], [image, 2], rule)
        caches.append(model.compress(**inputs(name, alone)))
    return caches


def alone(name):
    """Families that tile an image otherwise when it is not alone have other vision tokens then."""
    return "batch_num_images" not in inputs(name, prompt(name, [0, 1], [1, 1, 1]))


@torch.no_grad()
def any_order_and_any_text_equals_one_pass(name, rule):
    if not alone(name):
        pytest.skip("tiles an image otherwise when it is not alone")
    if name == "llama4":
        pytest.skip("attends in chunks: a block moves by whole chunks only (test_exactness, test_families)")
    model = shared(name, rule=rule)
    caches = compressed_apart(name, model, rule)
    draw = random.Random(f"{name} {rule}")
    for _ in range(3):
        order = draw.sample(range(NUM_IMAGES), draw.randint(2, NUM_IMAGES))
        texts = [draw.randint(0, 5) for _ in range(len(order) + 1)]
        if any(t == 0 for t in texts[1:-1]):
            texts = [max(t, 1) for t in texts]  # some families merge neighbouring images
        batch = inputs(name, prompt(name, order, texts, rule))
        cache = vp.VoCoCache.cat([caches[i] for i in order])
        stream = model.stream_inputs(batch)
        cached = model(**stream, voco_cache=cache).logits
        found = largest_difference(model, batch, model(**batch).logits, stream, cached)
        assert found <= TOLERANCE[torch.float32], (order, texts)


@torch.no_grad()
def a_prefix_read_once_equals_one_pass(name):
    """Text alone as the prefix, two rows of one prefix, and a prefix that holds a block."""
    model = shared(name)
    if vp.attachment(model).family.prefix_lm:
        pytest.skip("a prefix-LM reads its prompt both ways: no part of it can be read before the rest")
    rows = [["bos", "t3", "img", "c2", "t4"], ["bos", "t3", "t2", "img", "c1", "t1", "img", "c2", "t2"]]
    batch = inputs(name, rows, "left")
    stream = model.stream_inputs(batch)
    cache = model.compress(**batch)
    ids, mask = stream["input_ids"], stream["attention_mask"]
    first = [int(m.argmax()) for m in mask]
    shared_ids = ids[0, first[0] : first[0] + 4]
    ids[1, first[1] : first[1] + 4] = shared_ids
    batch["input_ids"][1, batch["attention_mask"][1].argmax() :][:4] = shared_ids
    expected = model(**batch).logits
    prefix = model.prefix_cache(shared_ids[None])
    before = [layer.keys.clone() for layer in prefix.layers]
    rest = [row[f + 4 :] for row, f in zip(ids, first, strict=True)]
    longest = max(map(len, rest))
    tail = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rest])
    tail_mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(r), (longest - len(r), 0)) for r in rest]
    )
    logits = model(input_ids=tail, attention_mask=tail_mask, voco_cache=cache, prefix_cache=prefix).logits
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, prefix.layers, strict=True))
    both = zip(
        text_columns(model, batch),
        stream_columns(model, {"input_ids": tail, "attention_mask": tail_mask}),
        strict=True,
    )
    for row, (a, b) in enumerate(both):
        assert (expected[row, a[4:]] - logits[row, b]).abs().max() <= TOLERANCE[torch.float32]
    # a prefix of the first row up to and with its block
    start = first[0]
    held = model.prefix_cache(ids[:1, start : start + 7], voco_cache=cache.row(0))
    more = model(input_ids=ids[:1, start + 7 :], prefix_cache=held).logits
    last = text_columns(model, batch)[0][-more.shape[1] :]
    assert (expected[0, last] - more[0]).abs().max() <= TOLERANCE[torch.float32]


def generation_after_a_prefix(name):
    model = shared(name)
    batch = inputs(name, [["bos", "t3", "img", "c2", "t4"]])
    new = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **new, two_stage=False)[0, -6:]
    stream, cache = model.stream_inputs(batch), model.compress(**batch)
    prefix = model.prefix_cache(stream["input_ids"][:, :4])
    rest = {"input_ids": stream["input_ids"][:, 4:], "attention_mask": stream["attention_mask"][:, 4:]}
    ways = [{}, {"num_beams": 1, "prompt_lookup_num_tokens": 2}]
    if not vp.attachment(model).family.windowed(model):
        ways.append({"cache_implementation": "static"})
    for options in ways:
        made = model.generate(**rest, voco_cache=cache, prefix_cache=prefix, **new, **options)
        assert torch.equal(made[0, -6:], expected)
    text = inputs(name, [["bos", "t3", "t4"]])["input_ids"]
    vocab = vp.attachment(model).vocab
    never = sorted({vocab.voco_id, *vocab.placeholders})  # in a prompt with images they are input only
    plain = model.generate(input_ids=text, suppress_tokens=never, **new)[0, -6:]
    assert torch.equal(model.generate(input_ids=text[:, 4:], prefix_cache=prefix, **new)[0, -6:], plain)
