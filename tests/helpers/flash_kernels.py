"""Variable-length causal kernels that a CPU can run, behind the call of the flash backend.

As a program (``python tests/helpers/flash_kernels.py LAYOUTS``, started by tests/core/test_gpu_backends.py
with Triton's interpreter on) it runs ``flash_attn``'s Triton kernels over drawn layouts and whole models, and
prints the largest differences from dense as a line of JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function

import voco_plugin as vp
from attention_layers import Layer, dense, tables
from voco_plugin.core.attention import backends, flash
from voco_plugin.core.attention.segments import plan_segments
from voco_plugin.core.layout import TokenKind
from voco_plugin.core.masks import TokenTable

PLAIN_CAUSAL = (
    "llava_llama",
    "llava_qwen2",
    "llava_tied",
    "qwen2_5_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "qwen3_vl",
)
"""Families whose segments are all plain causal."""


@contextlib.contextmanager
def in_any_dtype():
    """``by_lengths`` without its limit to halves, so that a comparison can be sharp."""
    patch = pytest.MonkeyPatch()
    patch.setattr(flash, "DTYPES", (*flash.DTYPES, torch.float32, torch.float64))
    try:
        yield
    finally:
        patch.undo()


@contextlib.contextmanager
def flash_on_a_cpu(kernel):
    """Models with ``attention="flash"`` run on a CPU, in fp32, on ``kernel``; gives the list of its calls."""
    ran: list[tuple] = []

    def counted(*args):
        ran.append(tuple(args[0].shape))
        return kernel(*args)

    patch = pytest.MonkeyPatch()
    patch.setattr(flash, "_refuse_cpu", lambda query: None)
    patch.setattr(flash, "varlen_kernel", lambda: counted)
    try:
        with in_any_dtype():
            yield ran
    finally:
        patch.undo()


def _apart(n: int, is_causal: bool, left: int | None, right: int | None) -> torch.Tensor:
    """``(n, n)``: pairs that the CUDA kernels hide: a window of ``left`` keys before and ``right`` after the
    query's own place, where they are 0 or more, and all keys after it where causal.
    """
    apart = torch.arange(n)[None] - torch.arange(n)[:, None]
    hidden = torch.zeros(n, n, dtype=torch.bool)
    if left is not None and left >= 0:
        hidden |= apart < -left
    if is_causal or (right is not None and right >= 0):
        hidden |= apart > (0 if is_causal else right)
    return hidden


def _sequences(starts, is_causal, left, right, groups, query, key, value):
    """Each sequence alone, heads in front, keys and values repeated for their groups, and what it hides."""
    for start, stop in itertools.pairwise(starts.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        hidden = _apart(stop - start, is_causal, left, right)
        yield slice(start, stop), q, k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0), hidden


def _forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, **more,
):  # fmt: skip
    assert torch.equal(cum_seq_q, cum_seq_k) and max_q == max_k == int(cum_seq_q.diff().max())
    assert cum_seq_q.dtype == torch.int32 and int(cum_seq_q[-1]) == len(query) == len(key) and not dropout_p
    out, sums = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float)
    limits = (is_causal, window_size_left, window_size_right)
    groups = query.shape[1] // key.shape[1]
    for at, q, k, v, hidden in _sequences(cum_seq_q, *limits, groups, query, key, value):
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        out[at], sums[:, at] = (scores.softmax(dim=-1) @ v).transpose(0, 1), scores.logsumexp(dim=-1)
    return out, sums, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), query.new_empty(0)


def _backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """FlashAttention-2's formula (Alg. 2), from what the forward left."""
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    limits = (is_causal, window_size_left, window_size_right)
    groups = query.shape[1] // key.shape[1]
    for at, q, k, v, hidden in _sequences(cum_seq_q, *limits, groups, query, key, value):
        grad, o = (x[at].transpose(0, 1) for x in (grad_out, out))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        p = (scores - logsumexp[:, at, None]).exp()
        ds = p * (grad @ v.transpose(1, 2) - (grad * o).sum(dim=-1, keepdim=True)) * scale
        dq[at] = (ds @ k).transpose(0, 1)
        for whole, made in ((dk, ds.transpose(1, 2) @ q), (dv, p.transpose(1, 2) @ grad)):
            whole[at] = made.unflatten(0, (-1, groups)).sum(dim=1).transpose(0, 1)
    return dq, dk, dv


@contextlib.contextmanager
def torch_varlen():
    """torch's own ``varlen_attn`` and its backward formula; plain attention stands in for the two CUDA
    kernels behind it.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield flash.varlen_kernel()


def kernel_gradients(kernel, table, groups, dtype=torch.float32, dim=16) -> float:
    """The largest :func:`relative` difference from dense in fp32 on the same numbers."""
    config = vp.VoCoConfig()
    plan = plan_segments(config, table, causal_mask_function)
    rows, width = table.kind.shape
    draw = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, width, dim) for heads in (2 * groups, 2, 2)]
    tensors = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    real = (table.kind != TokenKind.PAD)[:, :, None, None]
    weight = torch.randn(rows, width, 2 * groups, dim, generator=draw).to(dtype) * real
    stock, layer = backends.KERNELS["sdpa"][0], Layer(groups)
    found = []
    for call, kind in (
        (lambda *qkv: flash.by_lengths(kernel, plan, layer, *qkv, scaling=0.3)[0], dtype),
        (lambda *qkv: dense(config, table, causal_mask_function, *qkv, stock, layer), torch.float32),
    ):
        leaves = [t.detach().to(kind).requires_grad_() for t in tensors]
        with in_any_dtype() if kind == torch.float32 else contextlib.nullcontext():
            out = call(*leaves)
        (out * weight.to(kind)).sum().backward()
        found.append([(out.detach() * real).float(), *(t.grad.float() for t in leaves)])
    return relative(*found)


def relative(found, expected) -> float:
    """The largest difference of outputs, relative to the largest output, and of gradients, relative to the
    largest gradient. Both lists: the output, then gradients.
    """
    sizes = [float(x.abs().max()) for x in expected]
    sizes = [sizes[0], *[max(sizes[1:])] * (len(sizes) - 1)]
    pairs = zip(found, expected, sizes, strict=True)
    return max(float((a - b).abs().max()) / size for a, b, size in pairs)


# -- flash_attn's Triton kernels


def gradients_of(model, batch, real) -> list[torch.Tensor]:
    """Logits of the real tokens, and the gradients of all parameters, end to end."""
    model.zero_grad()
    out = model(**batch).logits[real]
    out.float().pow(2).mean().backward()
    grads = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    model.zero_grad()
    return [out.detach(), torch.cat(grads)]


def triton_kernel():
    """The kernel of ``flash_attn``, whose operators say that they are for CUDA alone; and a list that grows
    with every Triton program that runs.
    """
    real = torch.library.custom_op

    def anywhere(name, fn=None, /, *, mutates_args, device_types=None, **more):
        return real(name, fn, mutates_args=mutates_args, **more)

    torch.library.custom_op = anywhere
    try:
        kernel = flash.varlen_kernel()
    finally:
        torch.library.custom_op = real
    from triton.runtime import interpreter

    ran: list[str] = []
    run = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        ran.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted
    return kernel, ran


def triton_against_dense(layouts: int) -> dict:
    """What tests/core/test_gpu_backends.py asks for, as figures."""
    from harness import inputs, layout_of, shared
    from packed import numbered

    kernel, ran = triton_kernel()
    found = {"layouts": 0, "float32": 0.0, "float16": 0.0, "families": 0.0}

    @settings(max_examples=layouts, deadline=None, database=None, derandomize=True)
    @given(tables(most_blocks=3, largest=40), st.sampled_from([1, 2, 3]), st.none() | st.integers(0, 99))
    def over_layouts(table, groups, seed):
        if seed is not None:
            table = numbered(table, torch.Generator().manual_seed(seed))
        found["layouts"] += 1
        for name in ("float32", "float16"):
            worst = kernel_gradients(kernel, table, groups, getattr(torch, name))
            found[name] = max(found[name], worst)

    over_layouts()
    kinds = [TokenKind.VISION] * 200 + [TokenKind.VOCO] * 3 + [TokenKind.VISION] * 129 + [TokenKind.VOCO] * 2
    kind = torch.tensor([kinds + [TokenKind.TEXT] * 140])  # longer than a kernel's tiles
    block = torch.tensor([[0] * 203 + [1] * 131 + [-1] * 140])
    long = TokenTable(kind, block, torch.arange(kind.shape[1])[None])
    found["long"] = kernel_gradients(kernel, long, 2)
    for name in ("llava_llama", "qwen2_5_vl", "idefics3"):
        with flash_on_a_cpu(kernel) as calls:
            batch = inputs(name)
            model = shared(name, torch.float32, "sdpa", "isolated", "flash")
            real = layout_of(model, batch).kind != TokenKind.PAD
            mine = gradients_of(model, batch, real)
            expected = gradients_of(shared(name), batch, real)
        assert len(calls) == model.get_decoder().config.num_hidden_layers
        found["families"] = max(found["families"], relative(mine, expected))
    return {**found, "programs": sorted(set(ran)), "runs": len(ran)}


if __name__ == "__main__":
    print(json.dumps(triton_against_dense(int(sys.argv[1]))))  # noqa: T201
