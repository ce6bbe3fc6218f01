"""Tiny attached models and the comparisons that the contract tests share."""

from __future__ import annotations

import dataclasses
from functools import cache

import torch

import voco_plugin as vp
from tiny import build, glue_ids, make_inputs, vision_ids, voco_id
from tiny.wide import EAGER_ONLY
from voco_plugin.core.layout import SequenceLayout, TokenKind
from voco_plugin.models.families import family_of

CORE = (
    "llava_llama",
    "llava_mistral",
    "llava_qwen2",
    "llava_tied",
    "qwen2_5_vl",
    "internvl",
    "gemma3",
    "idefics3",
    "smolvlm",
)
"""The families that SPINE names; the others of ``tiny.NAMES`` run in one rule each."""

RULES = {
    "isolated": {},
    "sequential": {"positions": "sequential"},
    "prefix": {"block_context": "prefix"},
    "star": {"rule": "star"},
    "star-prefix": {"rule": "star", "block_context": "prefix"},
    "hide-prefix": {"hide_prefix": True},
    "bos-sink": {"block_sink": "bos"},
    "pooled": {"token_init": "pooled"},
    "rival": {"compressor": "avg_pool"},
    "rival-prefix": {"compressor": "avg_pool", "block_context": "prefix"},
}

ROWS = [
    ["bos", "t3", "img", "c2", "t4"],
    ["bos", "t2", "img", "c2", "t1", "img", "c1", "t5"],
    ["bos", "t6"],
    ["img", "c3", "img", "c2", "t2"],
]


def rows_for(rule: str, rows=None):
    """``rows`` with the BOS copies that ``block_sink="bos"`` wants."""
    rows = ROWS if rows is None else rows
    if rule != "bos-sink":
        return rows
    return [[part for s in row for part in (["bos", s] if s.startswith("img") else [s])] for row in rows]


def vocabulary(name: str, model, config: vp.VoCoConfig) -> vp.TokenVocabulary:
    """The vocabulary, with the markers that only a processor knows taken from the tiny models' own list."""
    found = family_of(model.config).vocabulary(config=model.config, voco=config)
    markers = vision_ids(name) - found.placeholders
    return dataclasses.replace(found, markers=frozenset(markers), glue=frozenset(glue_ids(name)))


def plain(name: str, dtype=torch.float32, attn: str = "sdpa", seed: int = 0):
    model = build(name, dtype=dtype, seed=seed)
    model.get_decoder().config._attn_implementation_internal = "eager" if name in EAGER_ONLY else attn
    return model


def attached(name: str, dtype=torch.float32, attn: str = "sdpa", **options):
    """A tiny model with VoCo on."""
    model = plain(name, dtype, attn)
    config = vp.VoCoConfig(token_id=voco_id(name), **{"attention": "dense", **options})
    return trained(vp.attach(model, config, vocabulary=vocabulary(name, model, config)))


def trained(model, seed: int = 0):
    """``model`` with weights in its compressor that say something; new ones change nothing."""
    compressor = getattr(model, "voco_compressor", None)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in () if compressor is None else compressor.parameters():
            noise = torch.randn(parameter.shape, generator=draw) * 0.3
            parameter.copy_(noise.to(parameter.dtype))
    return model


@cache
def shared(
    name: str, dtype=torch.float32, attn: str = "sdpa", rule: str = "isolated", attention: str = "dense"
):
    """An attached model that tests read and do not change."""
    return attached(name, dtype, attn, attention=attention, **RULES[rule])


def inputs(name: str, rows=None, side: str = "right", dtype=torch.float32, **more):
    return make_inputs(
        name, ROWS if rows is None else rows, padding_side=side, dtype=dtype, voco_id=voco_id(name), **more
    )


def layout_of(model, batch) -> SequenceLayout:
    return SequenceLayout.from_ids(batch["input_ids"], batch["attention_mask"], vp.attachment(model).vocab)


def text_columns(model, batch) -> list[list[int]]:
    """Per row, the columns of its text tokens."""
    kind = layout_of(model, batch).kind
    return [(row == TokenKind.TEXT).nonzero().flatten().tolist() for row in kind]


def stream_columns(model, stream) -> list[list[int]]:
    """Per row, the columns of the text tokens of a compressed stream."""
    voco = vp.attachment(model).vocab.voco_id
    keep = stream["attention_mask"].bool() & (stream["input_ids"] != voco)
    return [row.nonzero().flatten().tolist() for row in keep]


def largest_difference(model, batch, logits, stream, cached_logits) -> float:
    """Largest absolute difference of the text rows of a single pass and of stage 2."""
    worst = 0.0
    for row, (a, b) in enumerate(zip(text_columns(model, batch), stream_columns(model, stream), strict=True)):
        assert len(a) == len(b) > 0
        worst = max(worst, float((logits[row, a] - cached_logits[row, b]).abs().max()))
    return worst


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
