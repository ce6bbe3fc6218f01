"""Contract 1 for caches that travel: blocks of different caches in any order, with any text before, between
and after them, behind a prefix that was read once; equal to one pass over that prompt.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import voco_plugin as vp
from contracts import placing
from contracts.placing import compressed_apart
from harness import (
    CORE,
    RULES,
    shared,
)
from matrix import combined, quick_rule
from tiny import NAMES

MOVABLE = [r for r in RULES if not r.endswith("prefix") or r == "hide-prefix"]
"""``block_context="prefix"`` ties a block to its prompt."""


@pytest.mark.parametrize(
    ("name", "rule"),
    combined([(n, r) for n in NAMES for r in MOVABLE if r == "isolated" or n in CORE], quick_rule),
)
def test_any_order_and_any_text_equals_one_pass(name, rule):
    placing.any_order_and_any_text_equals_one_pass(name, rule)


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_read_once_equals_one_pass(name):
    placing.a_prefix_read_once_equals_one_pass(name)


@pytest.mark.parametrize("name", ["llava_llama", "llava_mistral", "qwen2_5_vl", "gemma3"])
def test_generation_after_a_prefix(name):
    placing.generation_after_a_prefix(name)


def test_a_prefix_of_another_model_or_rule_is_refused():
    prefix = shared("llava_llama").prefix_cache(torch.tensor([[1, 40, 41]]))
    ids = torch.tensor([[50, 51]])
    other = shared("llava_llama", rule="sequential")
    with pytest.raises(ValueError, match="prefix_cache was not made by .*: positions is"):
        other(input_ids=ids, prefix_cache=prefix)
    with pytest.raises(ValueError, match="make it with model.prefix_cache"):
        other(input_ids=ids, prefix_cache=hf.DynamicCache())


def test_insert_drop_and_reorder():
    model = shared("llava_llama")
    caches = compressed_apart("llava_llama", model)
    joined = vp.VoCoCache.cat(caches)

    def names(cache):
        known = {c.blocks[0].keys[0].sum().item(): i for i, c in enumerate(caches)}
        return [known[b.keys[0].sum().item()] for b in cache]

    assert names(joined) == [0, 1, 2, 3]
    assert names(joined.reorder([2, 0, 3, 1])) == [2, 0, 3, 1]
    assert names(joined.drop(1)) == [0, 2, 3]
    assert names(joined.drop([0, -1])) == [1, 2]
    assert names(caches[0].insert(0, caches[3])) == [3, 0]
    for index in (0, 1, 2, 99, -1, -9):
        expected = [0, 1]
        expected.insert(index, 2)
        assert names(joined[:2].insert(index, caches[2])) == expected
    with pytest.raises(ValueError, match="name each of the 4 blocks once"):
        joined.reorder([0, 0, 1, 2])
    with pytest.raises(IndexError):
        joined.drop(4)
    with pytest.raises(ValueError, match="insert works on one row"):
        vp.VoCoCache.stack(caches[:2]).insert(0, caches[2])
