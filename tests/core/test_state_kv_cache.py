"""What a KV cache is remembered to hold fits its rows and slots, whatever was done to it since: it goes on as
rows that were read anew.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from contracts import kv_cache as contracts
from contracts.kv_cache import (
    COPIES,
    LLAMA,
    NAMES,
    ROWS,
    SELECTIONS,
    WAYS,
    alone,
    batch_of,
    check,
    go_on,
    made,
    model_of,
    more,
    read,
    same,
)
from harness import plain
from states import NEW, equal, keys_of, tensors_of, world
from voco_plugin._compat import cache_names
from voco_plugin.core.forward import as_cache, cache_of

# -- rows
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SELECTIONS)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_selected_rows_go_on_as_those_rows(way, how):
    contracts.selected_rows_go_on_as_those_rows(way, how)


@pytest.mark.parametrize("how", ["select 1 0", "select 0 0", "select 1"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_selected_rows_answer_as_those_rows(name, how):
    change, rows = SELECTIONS[how]
    model = model_of(name)
    options = {**NEW, "output_logits": True, "return_dict_in_generate": True}

    def answer(past, count):
        out = model.generate(input_ids=more(name, count), prefix_cache=past, **options)
        return torch.stack(out.logits, dim=1)

    expected = []
    for row in rows:
        past, _ = read(name, batch_of(name, [ROWS[row]], row), "a prefix")
        expected.append(answer(past, 1)[0])
    past, _ = made(name, "a prefix")
    change(past)
    same(answer(past, len(rows)), expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_second_image_after_a_selection_stands_where_it_does_in_that_row(name):
    """Blocks are placed behind what the row holds, and do not see it."""
    model = model_of(name)
    image = batch_of(name, [["t2", "img", "c2", "t3"]], 5)
    stream, blocks = model.stream_inputs(image), model.compress(**image)
    expected = []
    for row, spec in enumerate(ROWS):
        past, _ = read(name, batch_of(name, [spec], row), "a prefix")
        expected.append(model(**stream, voco_cache=blocks, prefix_cache=past).logits[0].nan_to_num())
    past, _ = made(name, "a prefix")
    past.batch_select_indices(torch.tensor([1, 0]))
    both = {key: value.expand(2, -1) for key, value in stream.items()}
    found = model(**both, voco_cache=blocks, prefix_cache=past).logits.nan_to_num()
    same(found, expected[::-1])


# -- slots
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["at once", "selected after", "selected before"])
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_text_that_was_cropped_off_can_be_read_again(way, then):
    contracts.text_that_was_cropped_off_can_be_read_again(way, then)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_cache_cropped_into_an_image_is_refused(way):
    contracts.a_cache_cropped_into_an_image_is_refused(way)


@pytest.mark.parametrize("source", ["a prefix", "stage two"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_slots_are_known_without_a_mask(name, source):
    contracts.padding_slots_are_known_without_a_mask(name, source)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_that_was_reset_is_an_empty_one(rows):
    contracts.a_cache_that_was_reset_is_an_empty_one(rows)


# -- copies
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_copy_goes_on_as_its_original_does(way, how):
    past, filled = made(*way[:2])
    check(way, COPIES[how](past), filled, [0, 1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("who", ["the original", "the copy"])
@pytest.mark.parametrize("way", LLAMA, ids="-".join)
def test_what_is_done_to_one_is_not_done_to_the_other(way, who, how):
    contracts.what_is_done_to_one_is_not_done_to_the_other(way, who, how)


@pytest.mark.parametrize("who", ["the original", "the copy"])
@pytest.mark.parametrize("way", LLAMA, ids="-".join)
def test_of_a_shallow_copy_what_is_remembered_fits_the_keys(way, who):
    contracts.of_a_shallow_copy_what_is_remembered_fits_the_keys(way, who)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prefix_is_not_what_was_read_behind_it(name):
    """Neither the prefix nor the blocks share memory with a KV cache that goes on from them."""
    model, batch = model_of(name), batch_of(name)
    stream, blocks = model.stream_inputs(batch), model.compress(**batch)
    past = model.prefix_cache(**stream, voco_cache=blocks)
    before = [t.clone() for t in (*tensors_of(blocks), *keys_of(past))]
    after = cache_of(model(input_ids=more(name, 2), prefix_cache=past))
    again = cache_of(model(**stream, voco_cache=blocks))
    for other in (after, again):
        other.crop(-1)
        other.batch_select_indices(torch.tensor([1, 0]))
        for tensor in keys_of(other):
            tensor.zero_()
    equal([*tensors_of(blocks), *keys_of(past)], before)
    same(
        go_on(name, past, torch.empty(0), "prefix_cache", more(name, 2)),
        alone(name, "a prefix", "prefix_cache"),
    )


# -- beams
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returned", [1, 3])
@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_beams_are_those_without_a_cache_and_those_of_each_row_alone(name, two_stage, returned):
    model, batch = model_of(name), batch_of(name)
    beams = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": returned, "do_sample": False}
    found = model.generate(**batch, **beams, two_stage=two_stage)
    new = found[:, batch["input_ids"].shape[1] :]
    without = model.generate(**batch, **beams, two_stage=False, use_cache=False)
    assert torch.equal(found, without)
    for row, spec in enumerate(ROWS):
        one = batch_of(name, [spec], row)
        made_alone = model.generate(**one, **beams, two_stage=two_stage)[:, one["input_ids"].shape[1] :]
        assert torch.equal(made_alone, new[row * returned : (row + 1) * returned])


# -- other people's caches
# ------------------------------------------------------------------------------------------------------------


def attributes(past: Any) -> set[str]:
    return {name for owner in (past, *past.layers) for name in vars(owner)}


@pytest.mark.parametrize("argument", cache_names())
@torch.no_grad()
def test_text_alone_leaves_nothing_on_a_users_cache_and_goes_on_from_it(argument):
    w, stock = world(), plain("llava_llama")
    found = []
    for model in (stock, w.model):
        past = DynamicCache()
        first = model.generate(**w.text, **NEW, **{argument: past}, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, w.text["input_ids"][:, -2:]], dim=1)
        mask = torch.cat([w.text["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
        second = model.generate(input_ids=ids, attention_mask=mask, **NEW, **{argument: past})
        found.append((first.sequences, second, attributes(past), keys_of(past)))
    (one, two, its, keys), (ours, ours_too, mine, my_keys) = found
    equal([ours, ours_too, *my_keys], [one, two, *keys])
    assert mine == its


@torch.no_grad()
def test_text_alone_on_a_users_static_cache_is_as_ever():
    w, stock = world(), plain("llava_llama")
    found = []
    for model in (stock, w.model):
        past = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
        found.append((model.generate(**w.text, **NEW, **as_cache(past)), attributes(past)))
    equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_images_on_a_users_own_cache_are_answered_and_gone_on_from(name):
    model, batch = model_of(name), batch_of(name)
    past = DynamicCache()
    found = model.generate(**batch, **NEW, **as_cache(past))
    assert torch.equal(found, model.generate(**batch, **NEW, two_stage=False))
    tail = found[:, -NEW["max_new_tokens"] :]
    ids = torch.cat([tail[:, -1:], more(name, 2)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 7, dtype=torch.long)], dim=1)
    again = model(input_ids=ids, attention_mask=mask, **as_cache(past)).logits[:, 1:]
    for row, spec in enumerate(ROWS):
        one, filled = read(name, batch_of(name, [spec], row), "one pass")
        whole = torch.cat([tail[row : row + 1], more(name, 1)], dim=1)
        same(again[row : row + 1], [go_on(name, one, filled, "past", whole)[0, -4:]])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["norm", "after"])
def test_a_users_cache_of_a_forward_that_was_stopped_at_its_end_goes_on_or_is_refused(place, error):
    contracts.a_users_cache_of_a_stopped_forward_goes_on_or_is_refused(place, error)
