"""What tests/core/test_exactness.py holds; run on broken versions too."""

from __future__ import annotations

import pytest
import torch

from harness import CORE, ROWS, RULES, TOLERANCE, inputs, largest_difference, rows_for, shared, text_columns
from measure import expected_masks, relocated
from reference import base_mask, letters, rule_mask
from tiny import vision_ids, voco_id
from tiny.wide import BACKBONES
from voco_plugin.core.attention import interface

SIDES = ("right", "left")


@torch.no_grad()
def two_stage_equals_single_pass(name, rule, attn, dtype):
    model = shared(name, dtype, attn, rule)
    for side in SIDES:
        batch = inputs(name, rows_for(rule), side, dtype)
        logits = model(**batch).logits
        cache = model.compress(**batch)
        stream = model.stream_inputs(batch)
        cached = model(**stream, voco_cache=cache).logits
        assert len(cache) == 5 and cache.num_tokens == [2, 2, 1, 3, 2]
        # transformers' eager attention takes its softmax in fp32 whatever the dtype
        loose = attn == "eager" or (name in BACKBONES and BACKBONES[name].loose_fp64)
        tolerance = 1e-5 if loose and dtype == torch.float64 else TOLERANCE[dtype]
        assert largest_difference(model, batch, logits, stream, cached) <= tolerance


@torch.no_grad()
def the_mask_of_every_layer_is_the_table(name, rule, attn, monkeypatch):
    """The mask that reaches each text layer's attention, against loops over the table and the backbone's own
    mask.
    """
    model = shared(name, torch.float32, attn, rule)
    seen = []
    key = f"voco_{attn}"
    from transformers import AttentionInterface

    stock = AttentionInterface._global_mapping[key]

    def spy(module, query, key_states, value, attention_mask, **kwargs):
        seen.append((getattr(module, "layer_idx", None), attention_mask))
        return stock(module, query, key_states, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, key, spy)
    types = getattr(model.get_decoder().config, "layer_types", None)
    for side in SIDES:
        batch = inputs(name, rows_for(rule), side)
        seen.clear()
        model(**batch)
        expected = expected_masks(name, rule, batch)
        assert len(seen) == model.get_decoder().config.num_hidden_layers
        real = batch["attention_mask"].bool()
        for layer, mask in seen:
            kind = types[layer] if types else "full_attention"
            if name in ("llava_mistral", "mistral3_window"):
                kind = "sliding_attention"  # every Mistral layer has the window
            shown = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
            assert torch.equal(shown[real], expected[kind][real]), f"layer {layer} ({kind}), {side}"


@torch.no_grad()
def batched_equals_one_by_one(name, rule):
    model = shared(name, torch.float32, "sdpa", rule)
    batch = inputs(name, rows_for(rule), "left")
    if rule == "prefix" and model._voco_attachment.family.prefix_lm:
        with pytest.raises(ValueError, match="reads its prompt both ways"):
            model.compress(**batch)
        return
    logits = model(**batch).logits
    columns = text_columns(model, batch)
    for row in range(len(ROWS)):
        alone = inputs(name, [ROWS[row]], first_row=row)
        single = model(**alone).logits[0]
        own = text_columns(model, alone)[0]
        assert (logits[row, columns[row]] - single[own]).abs().max() <= 1e-4
        cache = model.compress(**alone)
        whole = model.compress(**batch).row(row)
        assert len(cache) == len(whole)
        for a, b in zip(cache, whole, strict=True):
            for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
                assert (x - y).abs().max() <= 1e-4


def relocated_equals_recomputed(name):
    """Blocks of two prompts, reordered in a third at other positions, against a fresh pass over the third."""
    found = relocated(name)
    if found is None:
        assert name == "llava_onevision"  # tiles an image differently when it is not alone
    else:
        assert found <= 1e-4


@torch.no_grad()
def no_leak(name, monkeypatch):
    """Contract 2: with the VoCo tokens' keys removed, other pixels change no text logit by one bit."""
    from voco_plugin.core.layout import TokenKind

    real = interface.isolation_predicate

    def without_voco_keys(config, table):
        predicate = real(config, table)

        def cut(b, h, q, k):
            readers = (table.block[b, q] < 0) & (table.kind[b, k] == TokenKind.VOCO)
            return predicate(b, h, q, k) & ~readers

        return cut

    for rule in RULES if name in CORE else ("isolated",):
        model = shared(name, torch.float32, "sdpa", rule)
        batch = inputs(name, rows_for(rule))
        other = dict(batch)
        for key, value in batch.items():
            if "pixel_values" in key:
                other[key] = value + torch.where(value == 0, 0.0, 0.7)  # an all-zero tile is padding
        columns = text_columns(model, batch)
        kept = (model(**batch).logits, model(**other).logits)
        with monkeypatch.context() as patch:
            patch.setattr(interface, "isolation_predicate", without_voco_keys)
            cut = (model(**batch).logits, model(**other).logits)
        for row in range(len(ROWS)):
            assert torch.equal(cut[0][row, columns[row]], cut[1][row, columns[row]]), rule
        assert (kept[0][0, columns[0]] - kept[1][0, columns[0]]).abs().max() > 1e-3, (
            "pixels must matter otherwise"
        )


@torch.no_grad()
def single_pass_equals_the_plain_model_under_a_4d_mask(attn):
    """The reference that needs nothing of this package: a 4-D mask and positions given to the stock model."""
    from harness import plain
    from reference import compact_numbers

    name = "llava_llama"
    batch = inputs(name, [["bos", "t3", "img", "c2", "t4", "img", "c1", "t3"]])
    ids = batch["input_ids"][0].tolist()
    text = letters(ids, [1] * len(ids), vision=vision_ids(name), voco=voco_id(name))
    mask = (base_mask(text) & rule_mask(text))[None, None]
    if attn == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    stock = plain(name, attn=attn)
    positions = torch.tensor([compact_numbers(text)])
    expected = stock(**{**batch, "attention_mask": mask}, position_ids=positions).logits
    assert torch.equal(shared(name, torch.float32, attn)(**batch).logits, expected)
