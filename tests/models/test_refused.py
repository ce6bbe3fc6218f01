"""Recurrent, convolutional and cross-attending models are refused by what they are."""

from __future__ import annotations

import re

import pytest

from refused import CONFIGS, refusal

WHY = {
    "mllama": "cross-attention",
    "idefics": "cross-attention",
    "florence2": "encoder-decoder",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_refused_with_the_reason(name):
    why = WHY.get(name, "recurrent|convolution")
    assert re.search(why, refusal(name)), refusal(name)
