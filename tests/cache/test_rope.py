"""Every kind of rotary encoding is moved exactly, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import voco_plugin as vp
from contracts import rope
from contracts.rope import KINDS, LIMIT, NAME, difference, model_with, with_rope
from harness import inputs
from tiny.models import config as config_of
from voco_plugin.cache.place.relocation import RelocationError

BOUNDED = ("dynamic", "longrope")


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
    rope.past_its_limit_it_is_refused(kind)


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
    text = vp.attachment(model).family.text_model(model)
    text.config.floor_scale = 17  # the prompt has 16 tokens
    cache, stream = model.compress(**batch), model.stream_inputs(batch)
    model(**stream, voco_cache=cache)
    text.config.floor_scale = 16
    cache = model.compress(**batch)
    with pytest.raises(RelocationError, match="scales queries by their slot from token 16 on"):
        model(**stream, voco_cache=cache)
