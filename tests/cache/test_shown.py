"""What a person sees of caches, models and registries in a console or a notebook."""

from __future__ import annotations

import pytest

import voco_plugin as vp
from harness import attached, inputs


@pytest.fixture(scope="module")
def cache() -> vp.VoCoCache:
    model = attached("llava_llama")
    return model.compress(**inputs("llava_llama", [["bos", "img", "c2", "t2"], ["bos", "img", "c1", "t1"]]))


def test_a_block_says_what_it_is_and_no_tensor(cache):
    assert repr(cache[1].blocks[0]) == repr(cache.blocks[1])
    said = repr(cache.blocks[0])
    assert said.startswith("VoCoBlock(K=2 for 9 vision tokens, 2 layers, float32 on cpu, at position ")
    assert "tensor" not in said and len(said) < 120


def test_a_cache_is_a_table_in_a_notebook(cache):
    text = cache._repr_html_()
    assert text.count("<tr>") == 3 and "rule=isolated" in text and "VoCoCache(2 blocks" in text
    many = vp.VoCoCache.cat([cache] * 8)
    assert many._repr_html_().count("<tr>") == 11 and "and 6 more" in many._repr_html_()
    assert "<tr><th>" in vp.VoCoCache()._repr_html_()


@pytest.mark.parametrize("index", [2, -3, [0, 5]])
def test_a_block_that_is_not_there_is_named(cache, index):
    with pytest.raises(IndexError, match="is outside this cache's 2 blocks"):
        cache[index]


def test_registries_and_attachments_name_what_they_hold():
    assert "clip" in repr(vp.registry.encoders).lower() and repr(vp.registry.llms).startswith(
        "Registry('llms': "
    )
    said = repr(vp.attachment(attached("llava_llama")))
    assert "rule='isolated'" in said and "K=1" in said and " at 0x" not in said
