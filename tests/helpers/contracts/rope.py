"""What tests/cache/test_rope.py holds; run on broken versions too."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import voco_plugin as vp
from harness import largest_difference, vocabulary
from measure import moved_batch
from tiny import build, voco_id
from tiny.models import config as config_of
from voco_plugin.cache.place.relocation import RelocationError

LIMIT = 64
"""Positions up to which the frequencies of `dynamic` and `longrope` stay what they are."""


KINDS = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
    },
}  # fmt: skip


NAME = "llava_llama"


def model_with(text: hf.PreTrainedConfig):
    """The tiny Llava with another text model, attached."""
    config = config_of(NAME)
    config.text_config = text
    stock = build(NAME)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(stock)(config).eval()
    model.load_state_dict(
        {k: v for k, v in stock.state_dict().items() if k in model.state_dict()}, strict=False
    )
    voco = vp.VoCoConfig(num_tokens=1, token_id=voco_id(NAME))
    return vp.attach(model, voco, vocabulary=vocabulary(NAME, model, voco))


def with_rope(kind: str):
    text = copy.deepcopy(config_of(NAME).text_config).to_dict()
    limit = LIMIT if kind == "dynamic" else 1024
    return model_with(
        hf.LlamaConfig(**{**text, "rope_parameters": KINDS[kind], "max_position_embeddings": limit})
    )


@torch.no_grad()
def difference(model, far: int) -> float:
    one, two, joined = moved_batch(NAME, far)
    cache = vp.VoCoCache.cat([model.compress(**two), model.compress(**one)])
    logits, stream = model(**joined).logits, model.stream_inputs(joined)
    cached = model(**stream, voco_cache=cache).logits
    return largest_difference(model, joined, logits, stream, cached)


def past_its_limit_it_is_refused(kind):
    with pytest.raises(
        RelocationError, match=rf"changes its frequencies past {LIMIT} positions.*keep the stream"
    ):
        difference(with_rope(kind), LIMIT)
