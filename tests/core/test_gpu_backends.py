"""What a GPU runs, compared with dense on a CPU, outputs and gradients, as far as its libraries go there.

flex    torch refuses a backward on a CPU at the door; behind it stands an uncompiled implementation of both
        passes. It reads the predicate of the block mask; the tiles that the compiled kernels go by, in the
        forward and in the backward, are read off the block mask and compared with the rule.
flash   the call goes through torch's own ``varlen_attn`` and its backward formula, with plain attention in
        the place of the CUDA kernels that it ends in; and through ``flash-attn``'s Triton kernels, which run
        in Triton's interpreter (where the package is there).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import voco_plugin as vp
from attention_layers import RULE_OPTIONS, Layer, by_loops, dense, tables
from flash_kernels import (
    PLAIN_CAUSAL,
    flash_on_a_cpu,
    gradients_of,
    kernel_gradients,
    relative,
    torch_varlen,
)
from harness import RULES, attached, inputs, layout_of, rows_for, shared
from packed import LONG, numbered, packed_inputs
from paths import HELPERS, ROOT
from voco_plugin.core.attention import backends, flash, flex
from voco_plugin.core.forward import in_force
from voco_plugin.core.layout import TokenKind
from voco_plugin.core.masks import ActiveRule, isolation_predicate

TOLERANCE = 1e-5
"""Of outputs and gradients in fp32, relative to the largest."""

LAYOUT = (
    st.sampled_from(RULE_OPTIONS),
    st.sampled_from([1, 2, 3]),  # 3: heads that are no power of two go another way
    st.sampled_from([None, 7, 64]),
    st.none() | st.integers(0, 99),  # documents of packed rows
)


def drawn(table, seed):
    return table if seed is None else numbered(table, torch.Generator().manual_seed(seed))


# -- flex


@contextlib.contextmanager
def flex_trains_on_a_cpu():
    """Both doors open: torch's and our own. Nothing compiled: what runs is torch's reference."""
    import transformers.integrations.flex_attention as theirs
    from torch.nn.attention import flex_attention as torchs
    from transformers import masking_utils

    plain = functools.partial(torchs.create_block_mask, _compile=False)
    patch = pytest.MonkeyPatch()
    patch.setattr(masking_utils, "create_block_mask", lambda *, _compile, **arguments: plain(**arguments))
    patch.setattr(torchs, "_validate_device", lambda *tensors: None)
    patch.setattr(theirs.WrappedFlexAttention, "__call__", lambda self: torchs.flex_attention)
    patch.setattr(flex, "_refuse_training_on_cpu", lambda query: None)
    flex._masks.clear()
    torch._dynamo.reset()
    try:
        yield
    finally:
        patch.undo()
        torch._dynamo.reset()


def block_mask(config, table, function):
    """What a layer gets as its mask, as the backend makes it."""
    rows, width = table.kind.shape
    with in_force(ActiveRule(config, table)):
        return flex.flex_mask(
            batch_size=rows, q_length=width, kv_length=width, q_offset=0, kv_offset=0,
            mask_function=function, attention_mask=table.kind != TokenKind.PAD, device="cpu",
        )  # fmt: skip


def flex_against_dense(table, options, groups, window) -> float:
    """The largest :func:`relative` difference."""
    config = vp.VoCoConfig(**options)
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    rows, width = table.kind.shape
    draw = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, width, 8) for heads in (2 * groups, 2, 2)]
    tensors = [torch.randn(shape, generator=draw) for shape in shapes]
    real = (table.kind != TokenKind.PAD)[:, :, None, None]
    weight = torch.randn(rows, width, 2 * groups, 8, generator=draw) * real
    mask, layer = block_mask(config, table, function), Layer(groups)
    kernel = backends.KERNELS["sdpa"][0]
    found = []
    for call in (
        lambda *qkv: flex.flex_forward(layer, *qkv, mask, scaling=0.3)[0],
        lambda *qkv: dense(config, table, function, *qkv, kernel, layer),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = call(*leaves)
        (out * weight).sum().backward()
        found.append([out.detach() * real, *(t.grad for t in leaves)])
    return relative(*found)


@pytest.mark.matrix
@settings(max_examples=8, deadline=None)
@given(tables(most_blocks=3, largest=60), *LAYOUT)
def test_flex_gradients_equal_dense_on_any_layout(table, options, groups, window, seed):
    with flex_trains_on_a_cpu():
        assert flex_against_dense(drawn(table, seed), options, groups, window) <= TOLERANCE


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(tables(), *LAYOUT)
def test_flex_gradients_equal_dense_on_many_layouts(table, options, groups, window, seed):
    with flex_trains_on_a_cpu():
        assert flex_against_dense(drawn(table, seed), options, groups, window) <= TOLERANCE


def by_tiles(mask, rows, width, forward: bool) -> torch.Tensor:
    """``(B, N, N)``: what a kernel lets through that goes by the block mask's tiles, as the forward does (a
    row of tiles after the other) or as the backward does for keys and values (a column after the other).
    """
    q = torch.arange(width)[None, None, :, None]
    k = torch.arange(width)[None, None, None, :]
    asked = mask.mask_mod(torch.arange(rows)[:, None, None, None], torch.zeros_like(q), q, k)
    asked = asked.expand(rows, 1, width, width)[:, 0]
    tall, wide = mask.BLOCK_SIZE
    seen = torch.zeros(rows, width, width, dtype=torch.bool)
    names = ("kv_num_blocks", "kv_indices") if forward else ("q_num_blocks", "q_indices")
    for prefix, whole in (("", False), ("full_", True)):
        counts, indices = (getattr(mask, prefix + name) for name in names)
        for row, (count, index) in enumerate(zip(counts[:, 0], indices[:, 0], strict=True)):
            for at, number in enumerate(count.tolist()):
                for other in index[at, :number].tolist():
                    i, j = (at, other) if forward else (other, at)
                    tile = (row, slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide))
                    seen[tile] = True if whole else asked[tile]
    return seen


@settings(max_examples=30, deadline=None)
@given(tables(), *LAYOUT)
def test_the_tiles_of_the_block_mask_are_the_rule(table, options, groups, window, seed):
    """What the compiled kernels skip, take whole and ask the predicate about, in both passes."""
    table, config = drawn(table, seed), vp.VoCoConfig(**options)
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    rows, width = table.kind.shape
    with flex_trains_on_a_cpu():
        mask = block_mask(config, table, function)
    b, h = torch.arange(rows)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.long)
    q, k = torch.arange(width)[None, None, :, None], torch.arange(width)[None, None, None, :]
    expected = (function(b, h, q, k) & isolation_predicate(config, table)(b, h, q, k))[:, 0]
    real = table.kind != TokenKind.PAD
    expected = expected & real[:, None, :]
    for forward in (True, False):
        assert torch.equal(by_tiles(mask, rows, width, forward)[real], expected[real])


FLEX_FAMILIES = ("llava_mistral", "qwen2_5_vl", "internvl", "idefics3", "gemma3", "llava_tied", "qwen3_vl")


@pytest.mark.parametrize(
    ("name", "rule"),
    [("llava_llama", r) for r in RULES]
    + [pytest.param(n, r, marks=pytest.mark.slow) for n in FLEX_FAMILIES for r in ("isolated", "prefix")],
)
def test_families_train_under_flex_as_under_dense(name, rule):
    with flex_trains_on_a_cpu():
        for side in ("right", "left"):
            batch = inputs(name, rows_for(rule), side)
            model = shared(name, torch.float32, "sdpa", rule, "flex")
            real = layout_of(model, batch).kind != TokenKind.PAD
            found = gradients_of(model, batch, real)
            expected = gradients_of(shared(name, rule=rule), batch, real)
            assert found[1].abs().max() > 0 and relative(found, expected) <= TOLERANCE


def test_packed_rows_train_under_flex_as_under_dense():
    models = [attached("llava_llama", attention=a) for a in ("flex", "dense")]
    _, packed = packed_inputs(models[0], "llava_llama", LONG)
    real = packed["attention_mask"].bool()
    with flex_trains_on_a_cpu():
        assert relative(*(gradients_of(model, packed, real) for model in models)) <= TOLERANCE


def test_both_doors_are_shut_again():
    with flex_trains_on_a_cpu():
        pass
    query = torch.zeros(1, 1, 2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="'flex' has no backward on a CPU"):
        flex.flex_forward(Layer(1), query, query, query, None)


# -- flash


def torch_lacks_varlen() -> str:
    """The refusal of torch's own kernel where it cannot be called (before torch 2.12); else empty."""
    try:
        flash.varlen_kernel()
    except ValueError as problem:
        return str(problem)
    return ""


needs_varlen = pytest.mark.skipif(bool(torch_lacks_varlen()), reason=torch_lacks_varlen())
KERNELS = {"loops": lambda: contextlib.nullcontext(by_loops), "torch": torch_varlen}
EACH_KERNEL = ["loops", pytest.param("torch", marks=needs_varlen)]


@pytest.mark.parametrize("kernel", EACH_KERNEL)
@settings(max_examples=12, deadline=None)
@given(tables(most_blocks=4, largest=60), LAYOUT[1], LAYOUT[-1])
def test_flash_gradients_equal_dense_on_any_layout(kernel, table, groups, seed):
    with KERNELS[kernel]() as call:
        assert kernel_gradients(call, drawn(table, seed), groups) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kernel", EACH_KERNEL)
@settings(max_examples=150, deadline=None)
@given(tables(), LAYOUT[1], LAYOUT[-1])
def test_flash_gradients_equal_dense_on_many_layouts(kernel, table, groups, seed):
    with KERNELS[kernel]() as call:
        assert kernel_gradients(call, drawn(table, seed), groups) <= TOLERANCE


@needs_varlen
@pytest.mark.parametrize("name", PLAIN_CAUSAL)
def test_families_train_under_flash_as_under_dense(name):
    with torch_varlen() as kernel, flash_on_a_cpu(kernel) as ran:
        for side in ("right", "left"):
            batch = inputs(name, side=side)
            model = shared(name, torch.float32, "sdpa", "isolated", "flash")
            real = layout_of(model, batch).kind != TokenKind.PAD
            found = gradients_of(model, batch, real)
            expected = gradients_of(shared(name), batch, real)
            assert relative(found, expected) <= TOLERANCE
    assert len(ran) == 2 * model.get_decoder().config.num_hidden_layers


@needs_varlen
@pytest.mark.parametrize("groups", [1, 4])
def test_the_real_op_takes_the_call_for_a_gpu(groups, monkeypatch):
    """Shapes, dtypes and devices as the CUDA operators' own shape rules want them; nothing is computed.

    Autograd cannot run on pretended CUDA tensors without a GPU, so the backward operator is given what the
    forward leaves, as the formula does (which runs above).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda index: False)
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (
            torch.empty(12, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (2 * groups, 2, 2)
        )
        lengths = torch.empty(4, device="cuda", dtype=torch.int32)
        out = flash.varlen_kernel()(q, k, v, lengths, 5, 0.125)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
        rest = (lengths, lengths, 5, 5, True)
        inner, sums, state = varlen._varlen_attn._init_fn(q, k, v, *rest, 0.125, [-1, 0], groups > 1)
        assert (inner.shape, sums.shape) == (q.shape, (2 * groups, 12))
        grads = varlen._varlen_attn_backward._init_fn(out, q, k, v, inner, sums, *rest, state, 0.125, [-1, 0])
        assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]


def flash_attn_folder() -> Path | None:
    """Where the package ``flash_attn`` lies: installed, or in a folder of its own (``make flash-attn``)."""
    found = importlib.util.find_spec("flash_attn")
    if found is not None and found.origin is not None:
        return Path(found.origin).parents[1]
    folder = Path(os.environ.get("VOCO_FLASH_ATTN", Path(sys.prefix) / "flash-attn"))
    return folder if (folder / "flash_attn").is_dir() else None


@pytest.mark.slow
def test_the_triton_kernels_of_flash_attn_equal_dense():
    """``flash_attn_varlen_func`` as it is called on a GPU, its Triton kernels interpreted, in a process of
    its own: how Triton runs is decided when it is imported. Not in bf16, whose products the interpreter
    takes of the bits.
    """
    folder = flash_attn_folder()
    if folder is None:
        pytest.skip("flash-attn is not there; `make flash-attn` gets its Python part (no CUDA build)")
    pytest.importorskip("triton")
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS), str(folder)]),
        "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE", "TRITON_INTERPRET": "1",
    }  # fmt: skip
    made = subprocess.run(
        [sys.executable, str(HELPERS / "flash_kernels.py"), "12"],
        env=env, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    found = json.loads(made.stdout.splitlines()[-1])
    assert found["layouts"] >= 12 and {"attn_fwd", "_bwd_kernel_dq_causal"} <= set(found["programs"])
    assert max(found[name] for name in ("float32", "long", "families")) <= TOLERANCE
    assert found["float16"] <= 2e-3
