"""What a KV cache is remembered to hold fits its rows and slots, whatever was done to it since: it goes on as
rows that were read anew.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import voco_plugin as vp
from harness import TOLERANCE, attached, inputs, plain
from states import NEW, Once, disturbed, equal, in_a_thread, keys_of, raises, tensors_of, world
from voco_plugin._compat import cache_names
from voco_plugin.core.forward import as_cache, cache_of

fp64 = torch.float64
ROWS = [["bos", "t3", "img", "c2", "t4"], ["bos", "t2", "img", "c2", "t1", "img", "c1", "t5"]]
"""Other numbers of images and of text tokens: what is remembered of one row is wrong for the other."""
NAMES = ("llava_llama", "llava_mistral", "qwen2_5_vl")
"""Text sees every slot there is; windows ask where each slot stood; positions on three axes."""
WAYS = [
    *[(name, source, "prefix_cache") for name in NAMES for source in ("a prefix",)],
    *[(name, source, "past") for name in NAMES for source in ("one pass", "stage two")],
    ("llava_llama", "a prefix", "past"),
    ("llava_llama", "stage two", "prefix_cache"),
]
"""Where a KV cache comes from, and how a forward is given it."""
LLAMA = [way for way in WAYS if way[0] == "llava_llama"]


@cache
def model_of(name: str) -> Any:
    return attached(name, fp64)


def batch_of(name: str, rows=None, first_row: int = 0) -> dict[str, torch.Tensor]:
    return inputs(name, ROWS if rows is None else rows, "left", fp64, first_row=first_row)


def more(name: str, rows: int) -> torch.Tensor:
    """``(rows, 4)``: text that goes on, the same for all."""
    return inputs(name, [["t4"]], first_row=7)["input_ids"].expand(rows, -1)


@torch.no_grad()
def read(name: str, batch: dict[str, torch.Tensor], source: str) -> tuple[Any, torch.Tensor]:
    """A KV cache of ``batch``, and which of its slots are filled."""
    model = model_of(name)
    if source == "one pass":
        return cache_of(model(**batch, use_cache=True)), batch["attention_mask"]
    stream, blocks = model.stream_inputs(batch), model.compress(**batch)
    filled = _filled(model, stream)
    if source == "a prefix":
        return model.prefix_cache(**stream, voco_cache=blocks), filled
    return cache_of(model(**stream, voco_cache=blocks)), filled


def _filled(model: Any, stream: dict[str, torch.Tensor]) -> torch.Tensor:
    """Stage 2 puts the blocks in front, then the text, each padded on the left."""
    real = stream["attention_mask"].bool()
    voco = (stream["input_ids"] == vp.attachment(model).vocab.voco_id) & real
    parts = []
    for kind in (voco, real & ~voco):
        counts = kind.sum(dim=1)
        slots = torch.arange(int(counts.max()))
        parts.append(slots >= (counts.max() - counts)[:, None])
    return torch.cat(parts, dim=1).long()


@torch.no_grad()
def go_on(name: str, past: Any, filled: torch.Tensor, way: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(B, N, vocabulary)`` of text behind ``past``."""
    if way == "prefix_cache":
        return model_of(name)(input_ids=ids, prefix_cache=past).logits
    mask = torch.cat([filled, torch.ones_like(ids)], dim=1)
    return model_of(name)(input_ids=ids, attention_mask=mask, **as_cache(past)).logits


@cache
def alone(name: str, source: str, way: str) -> list[torch.Tensor]:
    """The reference: each row read by itself."""
    found = []
    for row, spec in enumerate(ROWS):
        past, filled = read(name, batch_of(name, [spec], row), source)
        found.append(go_on(name, past, filled, way, more(name, 1))[0])
    return found


def made(name: str, source: str) -> tuple[Any, torch.Tensor]:
    """Both rows in one KV cache of the test's own."""
    return read(name, batch_of(name), source)


def same(found: torch.Tensor, expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=TOLERANCE[fp64])


def check(way: tuple[str, str, str], past: Any, filled: torch.Tensor, rows: list[int], back=None) -> None:
    """``past`` goes on as the rows ``rows`` do, read alone. A cache that transformers made may be refused
    instead, by a message that says what was done to it.

    Args:
        back: ``(B, n)``, text that was cropped off and is read again first.
    """
    name, source, how = way
    ids = more(name, len(rows))
    ids = ids if back is None else torch.cat([back, ids], dim=1)
    try:
        found = go_on(name, past, filled, how, ids)[:, -4:]
    except ValueError as problem:
        assert source == "one pass" and re.search("select|reorder|repeat|copied|changed", str(problem)), (
            problem
        )
        return
    same(found, [alone(*way)[row] for row in rows])


# -- rows
# ------------------------------------------------------------------------------------------------------------

SELECTIONS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "select 1 0": (lambda past: past.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
    "select 1": (lambda past: past.batch_select_indices(torch.tensor([1])), [1]),
    "select 0 0": (lambda past: past.batch_select_indices(torch.tensor([0, 0])), [0, 0]),
    "reorder 1 0": (lambda past: past.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda past: past.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "repeat, then select": (
        lambda past: (past.batch_repeat_interleave(2), past.batch_select_indices(torch.tensor([3, 0]))),
        [1, 0],
    ),
    "select, then select back": (
        lambda past: [past.batch_select_indices(torch.tensor([1, 0])) for _ in range(2)],
        [0, 1],
    ),
}


@pytest.mark.parametrize("how", SELECTIONS)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_selected_rows_go_on_as_those_rows(way, how):
    past, filled = made(*way[:2])
    change, rows = SELECTIONS[how]
    change(past)
    check(way, past, filled[rows], rows)


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
    past, filled = made(*way[:2])
    if type(past.layers[0]).__name__ == "DynamicSlidingWindowLayer":
        with pytest.raises(RuntimeError, match="sliding window size was already reached"):
            past.crop(-2)  # transformers' own
        return
    rows = [0, 1] if then == "at once" else [1, 0]
    if then == "selected before":
        past.batch_select_indices(torch.tensor(rows))
    past.crop(-2)
    if then == "selected after":
        past.batch_select_indices(torch.tensor(rows))
    check(way, past, filled[rows][:, :-2], rows, back=batch_of(way[0])["input_ids"][rows, -2:])


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_cache_cropped_into_an_image_is_refused(way):
    name, source, how = way
    past, filled = made(name, source)
    if type(past.layers[0]).__name__ == "DynamicSlidingWindowLayer":
        return
    length = past.get_seq_length()
    with pytest.raises(ValueError, match="cropped inside a vision block"):
        past.crop(-10)
        go_on(name, past, filled[:, :-10], how, more(name, 2))
    assert past.get_seq_length() == length  # nothing was cut


@pytest.mark.parametrize("source", ["a prefix", "stage two"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_slots_are_known_without_a_mask(name, source):
    """Nobody outside can tell which slots of placed blocks are padding."""
    past, _ = made(name, source)
    found = model_of(name)(input_ids=more(name, 2), **as_cache(past)).logits
    same(found, alone(name, source, "past"))


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_cache_that_was_reset_is_an_empty_one(rows):
    model, batch = model_of("llava_llama"), batch_of("llava_llama")
    text = batch_of("llava_llama", [["bos", "t5"]] * rows)
    for new in (text, batch):
        past = cache_of(model(**batch, use_cache=True))
        past.reset()
        found = model(**new, use_cache=True, **as_cache(past))
        assert (found.logits - model(**new).logits).abs().max() <= TOLERANCE[fp64]


# -- copies
# ------------------------------------------------------------------------------------------------------------


def saved(past: Any) -> Any:
    file = io.BytesIO()
    torch.save(past, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda past: pickle.loads(pickle.dumps(past)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_copy_goes_on_as_its_original_does(way, how):
    past, filled = made(*way[:2])
    check(way, COPIES[how](past), filled, [0, 1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("who", ["the original", "the copy"])
@pytest.mark.parametrize("way", LLAMA, ids="-".join)
def test_what_is_done_to_one_is_not_done_to_the_other(way, who, how):
    past, filled = made(*way[:2])
    pair = [past, COPIES[how](past)]
    changed, left = pair if who == "the original" else pair[::-1]
    changed.crop(-2)
    changed.batch_select_indices(torch.tensor([1, 0]))
    changed.batch_repeat_interleave(2)
    for tensor in keys_of(changed):
        tensor.zero_()
    check(way, left, filled, [0, 1])


@pytest.mark.parametrize("who", ["the original", "the copy"])
@pytest.mark.parametrize("way", LLAMA, ids="-".join)
def test_of_a_shallow_copy_what_is_remembered_fits_the_keys(way, who):
    """transformers' ``copy.copy`` shares the layers: to select rows of one may select those of the other."""
    past, filled = made(*way[:2])
    pair = [past, copy.copy(past)]
    changed, left = pair if who == "the original" else pair[::-1]
    kept = [t.clone() for t in keys_of(left)]
    changed.batch_select_indices(torch.tensor([1, 0]))
    rows = [0, 1] if all(map(torch.equal, kept, keys_of(left))) else [1, 0]
    # going on writes to the layers, so each is asked by a copy of its own
    for one, order in ((copy.deepcopy(left), rows), (copy.deepcopy(changed), [1, 0])):
        check(way, one, filled[order], order)


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
@in_a_thread
@torch.no_grad()
def test_a_users_cache_of_a_forward_that_was_stopped_at_its_end_goes_on_or_is_refused(place, error):
    """All keys are written by then: text that goes on must not see the image in them."""
    name = "llava_llama"
    model, batch = model_of(name), batch_of(name)
    past = DynamicCache()
    with disturbed(model, place, Once(raises(error))), pytest.raises(error):
        model(**batch, use_cache=True, **as_cache(past))
    assert past.get_seq_length() == batch["input_ids"].shape[1]
    try:
        found = go_on(name, past, batch["attention_mask"], "past", more(name, 2))
    except ValueError as problem:
        assert "cache" in str(problem)
        return
    same(found, alone(name, "one pass", "past"))
