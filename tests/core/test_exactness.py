"""Contract 1: two-stage = single pass, batched = one by one, relocated = recomputed, over families and
rules.
"""

from __future__ import annotations

import pytest
import torch

from contracts import exactness
from harness import CORE, RULES
from matrix import REPRESENTATIVES, combined, quick_rule
from measure import checkpointed, lora_two_stage
from tiny import NAMES
from tiny.wide import EAGER_ONLY

CASES = [(n, r) for n in NAMES for r in RULES if n in CORE or r == "isolated"]
ATTENTION_CASES = [
    (n, r, a) for n, r in CASES for a in ("sdpa", "eager") if a == "eager" or n not in EAGER_ONLY
]


def quick_kernel(name, rule, attn):
    """The eager kernel, whose masks are numbers, on the representatives; both where there is no other."""
    return quick_rule(name, rule) and (attn == "sdpa" or name in (*REPRESENTATIVES, *EAGER_ONLY))


def quick_dtype(name, rule, attn, dtype):
    """fp64 where rounding hides least, fp32 too where each family is as it comes."""
    return quick_kernel(name, rule, attn) and (
        rule == "isolated" and attn == "sdpa" or (dtype == torch.float64) == (attn == "sdpa")
    )


@pytest.mark.parametrize(
    ("name", "rule", "attn", "dtype"),
    combined([(*case, d) for case in ATTENTION_CASES for d in (torch.float32, torch.float64)], quick_dtype),
    ids={torch.float32: "fp32", torch.float64: "fp64"}.get,
)
def test_two_stage_equals_single_pass(name, rule, attn, dtype):
    exactness.two_stage_equals_single_pass(name, rule, attn, dtype)


@pytest.mark.parametrize(("name", "rule", "attn"), combined(ATTENTION_CASES, quick_kernel))
def test_the_mask_of_every_layer_is_the_table(name, rule, attn, monkeypatch):
    exactness.the_mask_of_every_layer_is_the_table(name, rule, attn, monkeypatch)


@pytest.mark.parametrize(
    ("name", "rule"),
    combined([(n, r) for n in NAMES for r in ("isolated", "prefix", "sequential")], quick_rule),
)
def test_batched_equals_one_by_one(name, rule):
    exactness.batched_equals_one_by_one(name, rule)


@pytest.mark.parametrize("name", NAMES)
def test_relocated_equals_recomputed(name):
    exactness.relocated_equals_recomputed(name)


@pytest.mark.parametrize("name", NAMES)
def test_two_stage_equals_single_pass_under_lora(name):
    found, moved = lora_two_stage(name)
    assert found <= 1e-4 and moved > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name):
    assert checkpointed(name) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_no_leak(name, monkeypatch):
    exactness.no_leak(name, monkeypatch)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_single_pass_equals_the_plain_model_under_a_4d_mask(attn):
    exactness.single_pass_equals_the_plain_model_under_a_4d_mask(attn)
