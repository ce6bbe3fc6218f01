"""What single families add to the contracts: a prompt read both ways (PaliGemma), chunks (Llama 4)."""

from __future__ import annotations

import pytest
import torch

from harness import ROWS, inputs, largest_difference, shared
from tiny.models import NAMES, WINDOW, build
from voco_plugin.models.families import family_of

PREFIX_LMS = ("paligemma", "paligemma2")


def _with_answers(name: str, side: str, answer: int = 2):
    """A batch whose last ``answer`` tokens of each row are the answer (type 1), as in training."""
    batch = inputs(name, ROWS, side)
    for row, mask in enumerate(batch["attention_mask"]):
        batch["token_type_ids"][row, mask.nonzero().flatten()[-answer:]] = 1
    return batch


def _two_stage(model, batch, **changed) -> float:
    logits, cache = model(**batch).logits, model.compress(**batch)
    stream = {k: v for k, v in {**model.stream_inputs(batch), **changed}.items() if v is not None}
    return largest_difference(model, batch, logits, stream, model(**stream, voco_cache=cache).logits)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", PREFIX_LMS)
@torch.no_grad()
def test_the_answer_of_a_prefix_lm_stays_causal_in_stage_two(name, side):
    model = shared(name)
    batch = _with_answers(name, side)
    assert _two_stage(model, batch) <= 1e-4
    all_prompt = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    real = batch["attention_mask"].bool()
    moved = (model(**batch).logits - model(**all_prompt).logits)[real].abs().max()
    assert moved > 1e-2, "the types must matter"


@pytest.mark.parametrize("name", PREFIX_LMS)
@torch.no_grad()
def test_a_stream_without_types_is_read_as_stage_one_was(name):
    """All prompt where stage 1 was given types, as the processor writes a question; else causal."""
    model = shared(name)
    batch = inputs(name, ROWS, "left")
    assert _two_stage(model, batch, token_type_ids=None) <= 1e-4
    plain = {k: v for k, v in batch.items() if k != "token_type_ids"}
    assert _two_stage(model, plain) <= 1e-4
    real = batch["attention_mask"].bool()
    assert (model(**batch).logits - model(**plain).logits)[real].abs().max() > 1e-2, "the types must matter"


@pytest.mark.parametrize(("before", "k"), [(3, 2), (1, 1), (7, 1)])
@torch.no_grad()
def test_a_block_stands_only_where_chunks_cut_it_as_before(before, k):
    """Moved by any number of tokens: refused, or equal to a fresh pass; by whole chunks it is never refused.

    A block of seven fits into a chunk of eight at two places, so from there it also moves by one.
    """
    name, model = "llama4", shared("llama4")
    first = inputs(name, [["bos", f"t{before}", "img", f"c{k}", "t4"]])
    cache = model.compress(**first)
    refused = []
    for shift in range(2 * WINDOW + 1):
        batch = inputs(name, [["bos", f"t{before + shift}", "img", f"c{k}", "t4"]])
        batch["pixel_values"] = first["pixel_values"]
        stream = model.stream_inputs(batch)
        try:
            cached = model(**stream, voco_cache=cache).logits
        except ValueError as error:
            assert "attends in chunks of 8 tokens" in str(error)
            refused.append(shift)
            continue
        assert largest_difference(model, batch, model(**batch).logits, stream, cached) <= 1e-4, shift
    assert refused and not any(shift % WINDOW == 0 for shift in refused)
    assert (1 not in refused) == (before == 7)


@pytest.mark.parametrize("name", NAMES)
def test_positions_have_three_axes_where_the_config_divides_the_rotation(name: str) -> None:
    model = build(name)
    family, text = family_of(model.config), model.config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    assert family.multi_axis(family.backbone(model)) == ("mrope_section" in parameters)
    assert not family.shares_keys(model)
    text.num_kv_shared_layers = 1
    assert family.shares_keys(model)


def test_grids_are_told_by_their_name_whatever_they_are_of() -> None:
    family = family_of(None)
    assert family.has_grids({"pixel_values": 1, "video_grid_thw": torch.ones(1, 3)})
    assert not family.has_grids({"image_grid_thw": None, "second_per_grid_ts": 1})
