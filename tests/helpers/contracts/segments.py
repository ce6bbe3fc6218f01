"""What tests/core/test_segments.py holds; run on broken versions too."""

from __future__ import annotations

import torch

from harness import (
    inputs,
    layout_of,
    rows_for,
    shared,
)
from voco_plugin.core.layout import TokenKind


def families_equal_dense(name, rule, attn):
    """Logits and gradients of whole models, both padding sides, and the plan is really what ran."""
    reference = shared(name, torch.float32, attn, rule)
    model = shared(name, torch.float32, attn, rule, "segmented")
    for side in ("right", "left"):
        batch = inputs(name, rows_for(rule), side)
        real = layout_of(model, batch).kind != TokenKind.PAD
        gradients, logits = [], []
        for each in (reference, model):
            each.zero_grad()
            out = each(**batch).logits[real]
            out.float().pow(2).mean().backward()
            logits.append(out.detach())
            gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
            each.zero_grad()
        size = logits[0].abs().max()
        assert (logits[0] - logits[1]).abs().max() <= 1e-5 * size
        assert gradients[0].keys() == gradients[1].keys() and gradients[0]
        worst = max(float(g.abs().max()) for g in gradients[0].values())
        for key, grad in gradients[0].items():
            assert (grad - gradients[1][key]).abs().max() <= 1e-5 * worst, key
