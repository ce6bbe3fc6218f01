"""Every kind of rotary encoding is moved exactly, or refused with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

import voco_plugin as vp
from harness import inputs, largest_difference, vocabulary
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
BOUNDED = ("dynamic", "longrope")
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


def base(cls: type, **more):
    text = config_of(NAME).text_config.to_dict()
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "initializer_range", "pad_token_id",
    )  # fmt: skip
    return cls(**{k: text[k] for k in kept}, **more)


LAYOUTS = {
    "partial": lambda: base(hf.PhiConfig, partial_rotary_factor=0.5),
    "partial interleaved": lambda: base(hf.GlmConfig, head_dim=16, partial_rotary_factor=0.5),
    "interleaved": lambda: base(hf.CohereConfig),
    "none on some layers": lambda: base(hf.SmolLM3Config, no_rope_layers=[1, 0]),
    "with biases and norms": lambda: base(hf.Olmo2Config),
}


@torch.no_grad()
def difference(model, far: int) -> float:
    one, two, joined = moved_batch(NAME, far)
    cache = vp.VoCoCache.cat([model.compress(**two), model.compress(**one)])
    logits, stream = model(**joined).logits, model.stream_inputs(joined)
    cached = model(**stream, voco_cache=cache).logits
    return largest_difference(model, joined, logits, stream, cached)


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_block_equals_a_fresh_pass(kind):
    assert difference(with_rope(kind), 20 if kind in BOUNDED else 200) <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_rotated_channels_is_found(layout):
    model = model_with(LAYOUTS[layout]())
    assert difference(model, 40) <= 1e-4
    turns = vp.attachment(model).relocator._turns
    still = [keys is None for keys, _ in turns]
    assert still == ([False, True] if layout == "none on some layers" else [False, False])


@pytest.mark.parametrize("kind", BOUNDED)
def test_past_its_limit_it_is_refused(kind):
    with pytest.raises(
        RelocationError, match=rf"changes its frequencies past {LIMIT} positions.*keep the stream"
    ):
        difference(with_rope(kind), LIMIT)


@torch.no_grad()
@pytest.mark.parametrize("kind", BOUNDED)
def test_a_stream_that_grows_past_the_limit_is_refused_where_no_block_moves(kind):
    """The block alone was computed with the frequencies of a short sequence, the whole sequence is not."""
    model = with_rope(kind)
    batch = inputs(NAME, [["bos", "t3", "img", "c2", f"t{LIMIT}"]])
    cache = model.compress(**batch)
    with pytest.raises(RelocationError, match="changes its frequencies"):
        model(**model.stream_inputs(batch), voco_cache=cache)


@torch.no_grad()
def test_queries_scaled_by_their_slot_are_refused_where_slots_differ():
    from harness import attached

    model = attached("llama4")
    batch = inputs("llama4", [["bos", "t3", "img", "c2", "t4"]])
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    text = vp.attachment(model).family.text_model(model)
    text.config.floor_scale = 17  # the prompt has 16 tokens
    model(**stream, voco_cache=cache)
    text.config.floor_scale = 16
    with pytest.raises(RelocationError, match="scales queries by their slot from token 16 on"):
        model(**stream, voco_cache=cache)
