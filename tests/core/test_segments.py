"""The segmented backend equals the dense reference: outputs and gradients, drawn layouts and families."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import voco_plugin as vp
from attention_layers import RULE_OPTIONS, Layer, both, by_loops, dense, tables
from contracts import segments
from harness import (
    CORE,
    RULES,
    inputs,
    largest_difference,
    layout_of,
    plain,
    rows_for,
    shared,
    vocabulary,
)
from matrix import REPRESENTATIVES, combined, quick_rule
from tiny import NAMES, voco_id
from tiny.wide import EAGER_ONLY
from voco_plugin.core.attention import backends, flash, flex, interface
from voco_plugin.core.attention.segmented import run_plan
from voco_plugin.core.attention.segments import SegmentPlan, plan_segments
from voco_plugin.core.forward import in_force
from voco_plugin.core.layout import TokenKind
from voco_plugin.core.masks import ActiveRule, TokenTable, isolation_predicate

ANY_LAYOUT = given(
    tables(), st.sampled_from(RULE_OPTIONS), st.sampled_from([1, 3]), st.sampled_from([None, 7, 64])
)


@settings(max_examples=20, deadline=None)
@ANY_LAYOUT
def test_equals_dense_on_any_layout(table, options, groups, window):
    assert worst_difference(table, options, groups, window) <= 1e-9


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@ANY_LAYOUT
def test_equals_dense_on_many_layouts(table, options, groups, window):
    assert worst_difference(table, options, groups, window) <= 1e-9


def worst_difference(table, options, groups, window) -> float:
    """Of outputs and gradients; what the plan must not hold is checked on the way."""
    config = vp.VoCoConfig(**options)
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    (a, grads_a), (b, grads_b), plan = both(config, table, function, groups)
    pairs = zip((a, *grads_a), (b, *grads_b), strict=True)
    assert (b[table.kind == TokenKind.PAD] == 0).all()
    if window is None and options["rule"] == "isolated" and options["block_context"] == "self":
        assert options["hide_prefix"] or plan.mask_bytes == 0  # nothing is stored but indices
    return max(float((x - y).abs().max()) for x, y in pairs)


def test_memory_and_work_grow_with_the_tokens():
    """Of frames of 256 tokens the pairs computed grow with their number, not its square."""
    found = {}
    for frames in (4, 8, 16, 64):
        kind = ([TokenKind.VISION] * 256 + [TokenKind.VOCO] * 2) * frames + [TokenKind.TEXT] * 32
        block = [i for i in range(frames) for _ in range(258)] + [-1] * 32
        order = torch.arange(len(kind))[None]
        table = TokenTable(torch.tensor([kind]), torch.tensor([block]), order)
        found[frames] = plan_segments(vp.VoCoConfig(), table, causal_mask_function)
    assert all(plan.mask_bytes == 0 for plan in found.values())
    assert found[64].pairs / found[8].pairs < 8.5
    assert found[64].pairs < (64 * 258 + 32) ** 2 / 50
    assert [len(plan.groups) for plan in found.values()] == [2] * 4  # frames of one size are one call


CASES = [(n, r) for n in NAMES for r in RULES if n in CORE or r == "isolated"]


@pytest.mark.parametrize(
    ("name", "rule", "attn"),
    combined(
        [(n, r, a) for n, r in CASES for a in ("sdpa", "eager") if a == "eager" or n not in EAGER_ONLY],
        lambda n, r, a: quick_rule(n, r) and (a == "sdpa" or n in (*REPRESENTATIVES, *EAGER_ONLY)),
    ),
)
def test_families_equal_dense(name, rule, attn):
    segments.families_equal_dense(name, rule, attn)


def spied(monkeypatch) -> list:
    """The plans that run, layer by layer."""
    seen = []
    real = interface.run_plan

    def run(plan, *args, **kwargs):
        seen.append(plan)
        return real(plan, *args, **kwargs)

    monkeypatch.setattr(interface, "run_plan", run)
    return seen


@pytest.mark.parametrize("name", ["llava_llama", "llava_mistral", "gemma3", "qwen2_5_vl"])
def test_the_plan_is_what_the_layers_get(name, monkeypatch):
    model = shared(name, torch.float32, "sdpa", "isolated", "segmented")
    seen = []
    real = interface.run_plan
    monkeypatch.setattr(
        interface, "run_plan", lambda plan, *a, **k: (seen.append(plan), real(plan, *a, **k))[1]
    )
    model(**inputs(name))
    assert len(seen) == model.get_decoder().config.num_hidden_layers
    assert all(isinstance(plan, SegmentPlan) for plan in seen)
    seen.clear()
    text = inputs(name, [["bos", "t4"]])
    model(**text)
    assert not seen  # a batch without images runs as the plain backbone


@pytest.mark.parametrize(("name", "rule"), combined(CASES, quick_rule))
@torch.no_grad()
def test_two_stages_under_segments(name, rule):
    if name in EAGER_ONLY:
        pytest.skip("eager only; its attention is compared above")
    model = shared(name, torch.float32, "sdpa", rule, "segmented")
    batch = inputs(name, rows_for(rule), "left")
    stream, cache = model.stream_inputs(batch), model.compress(**batch)
    reference = shared(name, rule=rule)(**batch).logits
    cached = model(**stream, voco_cache=cache).logits
    assert largest_difference(model, batch, reference, stream, cached) <= 1e-4


def test_auto_chooses_by_length(monkeypatch):
    stock = plain("llava_llama")
    model = vp.attach(
        stock,
        vp.VoCoConfig(token_id=voco_id("llava_llama")),
        vocabulary=vocabulary("llava_llama", stock, vp.VoCoConfig(token_id=voco_id("llava_llama"))),
    )
    seen = []
    real = interface.run_plan
    monkeypatch.setattr(
        interface, "run_plan", lambda plan, *a, **k: (seen.append(plan), real(plan, *a, **k))[1]
    )
    model(**inputs("llava_llama"))
    assert not seen
    monkeypatch.setattr(interface, "SEGMENTED_FROM", 8)
    model(**inputs("llava_llama"))
    assert seen


def test_generation_under_segments():
    for name in ("llava_llama", "llava_mistral", "gemma3", "qwen2_5_vl"):
        batch = inputs(name, side="left")
        new = {"max_new_tokens": 4, "do_sample": False}
        expected = shared(name).generate(**batch, **new, two_stage=False)
        model = shared(name, torch.float32, "sdpa", "isolated", "segmented")
        assert torch.equal(model.generate(**batch, **new, two_stage=False), expected)
        assert torch.equal(model.generate(**batch, **new), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = shared("llava_llama", torch.float32, "sdpa", "isolated", "segmented")
    batch = inputs("llava_llama")
    model.zero_grad()
    model(**batch).logits.float().pow(2).mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        model.enable_input_require_grads()
        model.zero_grad()
        model(**batch).logits.float().pow(2).mean().backward()
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        model.eval()
    worst = max(float(g.abs().max()) for g in expected.values())
    for name, parameter in model.named_parameters():
        if name in expected:
            assert (parameter.grad - expected[name]).abs().max() <= 1e-6 * worst, name
    model.zero_grad()


# -- the other backends


@settings(max_examples=20, deadline=None)
@given(tables(most_blocks=4, largest=40), st.sampled_from([1, 2]))
def test_flash_lays_the_segments_end_to_end(table, groups):
    """The call that a GPU kernel gets, with loops in the kernel's place."""
    plan = plan_segments(vp.VoCoConfig(), table, causal_mask_function)
    rows, width = table.kind.shape
    draw = torch.Generator().manual_seed(0)
    shapes = [(rows, 2 * groups, width, 8), (rows, 2, width, 8), (rows, 2, width, 8)]
    query, key, value = (torch.randn(s, generator=draw).to(torch.bfloat16) for s in shapes)
    layer = Layer(groups)
    out, _ = flash.by_lengths(by_loops, plan, layer, query, key, value, scaling=0.3)
    kernel = backends.KERNELS["sdpa"][0]
    expected, _ = run_plan(plan, kernel, False, layer, query, key, value, scaling=0.3)
    assert out.shape == expected.shape and (out - expected).abs().max() <= 2e-2


def test_flash_refuses_what_it_cannot_do():
    batch = inputs("llava_llama")
    with pytest.raises(ValueError, match="attention='flash' needs a GPU, and the model is on cpu"):
        shared("llava_llama", torch.float32, "sdpa", "isolated", "flash")(**batch)
    order = torch.arange(6)[None]
    table = TokenTable(torch.tensor([[1, 2, 2, 2, 3, 1]]), torch.tensor([[-1, 0, 0, 0, 0, -1]]), order)
    half = [torch.zeros(1, 1, 6, 4, dtype=torch.bfloat16)] * 3
    window = plan_segments(vp.VoCoConfig(), table, sliding_window_causal_mask_function(2))
    with pytest.raises(ValueError, match="runs plain causal segments, and 1 of"):
        flash.by_lengths(by_loops, window, Layer(1), *half)
    plan = plan_segments(vp.VoCoConfig(), table, causal_mask_function)
    with pytest.raises(ValueError, match="takes fp16 or bf16, not torch.float32"):
        flash.by_lengths(by_loops, plan, Layer(1), *[t.float() for t in half])
    with pytest.raises(ValueError, match="has no softcap"):
        flash.by_lengths(by_loops, plan, Layer(1), *half, softcap=30.0)


def test_flash_refuses_a_torch_whose_kernel_takes_too_little(monkeypatch):
    from torch.nn.attention import varlen

    def as_in_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError("never called")

    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(varlen, "varlen_attn", as_in_2_10)
    with pytest.raises(ValueError, match="lacks enable_gqa, scale, window_size; use 'segmented'"):
        flash.varlen_kernel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@settings(max_examples=20, deadline=None)
@given(tables(most_blocks=4))
def test_flash_on_a_gpu(table):
    table = table.to("cuda")
    plan = plan_segments(vp.VoCoConfig(), table, causal_mask_function)
    rows, width = table.kind.shape
    query, key, value = (torch.randn(rows, 2, width, 64, device="cuda").bfloat16() for _ in range(3))
    out, _ = flash.run_flash(plan, Layer(1), query, key, value, scaling=0.125)
    expected, _ = flash.by_lengths(by_loops, plan, Layer(1), query, key, value, scaling=0.125)
    assert (out - expected).abs().max() <= 2e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, r) for n in ("llava_llama", "llava_mistral", "qwen2_5_vl") for r in RULES]
    + [(n, "isolated") for n in ("llava_qwen2", "llava_tied", "internvl", "idefics3", "smolvlm", "qwen3_vl")],
)
@torch.no_grad()
def test_flex_equals_dense(name, rule):
    """FlexAttention on a CPU (inference): the same block mask that a GPU gets. It compiles first."""
    model = shared(name, torch.float32, "sdpa", rule, "flex")
    for side in ("right", "left"):
        batch = inputs(name, rows_for(rule), side)
        real = layout_of(model, batch).kind != TokenKind.PAD
        expected = shared(name, rule=rule)(**batch).logits
        assert (model(**batch).logits - expected)[real].abs().max() <= 1e-4
        stream = model.stream_inputs(batch)
        cached = model(**stream, voco_cache=model.compress(**batch)).logits
        found = largest_difference(model, batch, expected, stream, cached)
        assert found <= 1e-4


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(tables(most_blocks=4, largest=120), st.sampled_from(RULE_OPTIONS), st.sampled_from([None, 7]))
@torch.no_grad()
def test_flex_equals_dense_on_any_layout(table, options, window):
    """The block mask that the backend makes, in torch's own flex_attention, uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    config = vp.VoCoConfig(**options)
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    rows, width = table.kind.shape
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(rows, 2, width, 8, generator=draw) for _ in range(3))
    real = table.kind != TokenKind.PAD
    with in_force(ActiveRule(config, table)):
        mask = flex.flex_mask(
            batch_size=rows, q_length=width, kv_length=width, q_offset=0, kv_offset=0,
            mask_function=function, attention_mask=real, device="cpu",
        )  # fmt: skip
    out = flex_attention(query, key, value, block_mask=mask, scale=0.3).transpose(1, 2)
    kernel = backends.KERNELS["sdpa"][0]
    expected = dense(config, table, function, query, key, value, kernel, Layer(1))
    assert (out - expected)[real].abs().max() <= 1e-5


@pytest.mark.slow
def test_flex_keeps_block_masks_of_a_layout():
    model = shared("llava_llama", torch.float32, "sdpa", "isolated", "flex")
    flex._masks.clear()
    batch = inputs("llava_llama")
    with torch.no_grad():
        first = model(**batch).logits
        kept = dict(flex._masks)
        again = model(**batch).logits
        model(**inputs("llava_llama", side="left"))
    assert len(kept) == 1 and len(flex._masks) == 2
    assert next(iter(flex._masks)) in kept and torch.equal(first, again)
    with pytest.raises(ValueError, match="'flex' has no backward on a CPU"):
        model(**batch)


def test_flex_keeps_a_block_mask_for_each_rule():
    """A mask that is kept for a layout is that of its rule alone: where two rules differ, so do the keys."""
    name = "llava_llama"
    batch = inputs(name)
    keys, masks = {}, {}
    for rule in RULES:
        if rule == "bos-sink":
            continue  # another layout
        config = vp.attachment(shared(name, rule=rule)).config
        table = TokenTable.from_layout(layout_of(shared(name), batch))
        keys[rule] = flex._layout_key(ActiveRule(config, table), batch["attention_mask"])
        n = table.length
        b, q, k = torch.arange(4)[:, None, None], torch.arange(n)[None, :, None], torch.arange(n)[None, None]
        masks[rule] = isolation_predicate(config, table)(b, 0, q, k)
    for one, other in itertools.combinations(keys, 2):
        assert torch.equal(masks[one], masks[other]) or keys[one] != keys[other], (one, other)
