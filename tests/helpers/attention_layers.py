"""Drawn layouts, and attention over them by several ways."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st

from voco_plugin.core.attention import backends
from voco_plugin.core.attention.segmented import run_plan
from voco_plugin.core.attention.segments import plan_segments
from voco_plugin.core.layout import TokenKind
from voco_plugin.core.masks import TokenTable, isolation_predicate

RULE_OPTIONS = [
    {"rule": rule, "block_context": context, "hide_prefix": hide, "positions": "sequential"}
    for rule, context, hide in itertools.product(("isolated", "star"), ("self", "prefix"), (False, True))
]


@st.composite
def tables(draw, most_blocks=6, largest=300):
    """A batch of rows of text and blocks, padded on either side."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        kind, block = [], []
        count = draw(st.integers(0, most_blocks))
        same = draw(st.booleans())  # frames of one size, or images of many
        size = draw(st.integers(1, largest))
        for number in range(count):
            text = draw(st.integers(0, 5))
            vision = size if same else draw(st.integers(1, largest))
            voco = draw(st.integers(0, 16))
            kind += [TokenKind.TEXT] * text + [TokenKind.VISION] * vision + [TokenKind.VOCO] * voco
            block += [-1] * text + [number] * (vision + voco)
        text = draw(st.integers(0 if kind else 1, 20))
        rows.append((kind + [TokenKind.TEXT] * text, block + [-1] * text))
    width = max(len(kind) for kind, _ in rows)
    left = draw(st.booleans())
    kinds, blocks = [], []
    for kind, block in rows:
        pad = width - len(kind)
        fill, none = [TokenKind.PAD] * pad, [-1] * pad
        kinds.append(fill + kind if left else kind + fill)
        blocks.append(none + block if left else block + none)
    order = torch.arange(width).expand(len(rows), width)
    return TokenTable(torch.tensor(kinds), torch.tensor(blocks), order)


class Layer(torch.nn.Module):
    """What transformers' attention functions read of a layer."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def dense(config, table, function, query, key, value, kernel, layer):
    rows, width = table.kind.shape
    b, h = torch.arange(rows)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.long)
    q, k = torch.arange(width)[None, None, :, None], torch.arange(width)[None, None, None, :]
    seen = function(b, h, q, k) & isolation_predicate(config, table)(b, h, q, k)
    seen = seen & (table.kind != TokenKind.PAD)[:, None, None, :]
    seen = seen | (q == k)  # a row of padding sees itself, so that it is a number; it is not compared
    return kernel(layer, query, key, value, seen, scaling=0.3)[0]


def both(config, table, function, groups=1, heads=2, dim=4):
    """Outputs and gradients of the two backends: ``((out, grads), (out, grads), plan)``."""
    rows, width = table.kind.shape
    draw = torch.Generator().manual_seed(0)
    shapes = [(rows, heads * groups, width, dim), (rows, heads, width, dim), (rows, heads, width, dim + 1)]
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    real = table.kind != TokenKind.PAD
    weight = torch.randn(rows, width, heads * groups, dim + 1, generator=draw, dtype=torch.float64)
    weight = weight * real[:, :, None, None]
    plan = plan_segments(config, table, function, torch.float64)
    kernel, layer = backends.KERNELS["sdpa"][0], Layer(groups)
    found = []
    for call in (
        lambda *qkv: dense(config, table, function, *qkv, kernel, layer),
        lambda *qkv: run_plan(plan, kernel, False, layer, *qkv, scaling=0.3)[0],
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = call(*leaves)
        (out * weight).sum().backward()
        found.append((out.detach() * real[:, :, None, None], [t.grad for t in leaves]))
    return (*found, plan)


def by_loops(query, key, value, lengths, longest, scale):
    """What a variable-length causal kernel computes, one sequence after the other."""
    out = []
    for start, stop in itertools.pairwise(lengths.tolist()):
        assert stop - start <= longest
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        made = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        out.append(made[0].transpose(0, 1))
    return torch.cat(out)
