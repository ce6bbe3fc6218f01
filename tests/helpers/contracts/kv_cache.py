"""What tests/core/test_state_kv_cache.py holds; run on broken versions too."""

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
from transformers import DynamicCache

import voco_plugin as vp
from harness import TOLERANCE, attached, inputs
from states import Once, disturbed, in_a_thread, keys_of, raises
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


def selected_rows_go_on_as_those_rows(way: tuple[str, str, str], how: str) -> None:
    past, filled = made(*way[:2])
    change, rows = SELECTIONS[how]
    change(past)
    check(way, past, filled[rows], rows)


def text_that_was_cropped_off_can_be_read_again(way: tuple[str, str, str], then: str) -> None:
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


@torch.no_grad()
def padding_slots_are_known_without_a_mask(name: str, source: str) -> None:
    """Nobody outside can tell which slots of placed blocks are padding."""
    past, _ = made(name, source)
    found = model_of(name)(input_ids=more(name, 2), **as_cache(past)).logits
    same(found, alone(name, source, "past"))


def a_cache_cropped_into_an_image_is_refused(way: tuple[str, str, str]) -> None:
    name, source, how = way
    past, filled = made(name, source)
    if type(past.layers[0]).__name__ == "DynamicSlidingWindowLayer":
        return
    length = past.get_seq_length()
    with pytest.raises(ValueError, match="cropped inside a vision block"):
        past.crop(-10)
        go_on(name, past, filled[:, :-10], how, more(name, 2))
    assert past.get_seq_length() == length  # nothing was cut


@torch.no_grad()
def a_cache_that_was_reset_is_an_empty_one(rows: int) -> None:
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


def what_is_done_to_one_is_not_done_to_the_other(way: tuple[str, str, str], who: str, how: str) -> None:
    past, filled = made(*way[:2])
    pair = [past, COPIES[how](past)]
    changed, left = pair if who == "the original" else pair[::-1]
    changed.crop(-2)
    changed.batch_select_indices(torch.tensor([1, 0]))
    changed.batch_repeat_interleave(2)
    for tensor in keys_of(changed):
        tensor.zero_()
    check(way, left, filled, [0, 1])


def of_a_shallow_copy_what_is_remembered_fits_the_keys(way: tuple[str, str, str], who: str) -> None:
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


# -- stopped
# ------------------------------------------------------------------------------------------------------------


@in_a_thread
@torch.no_grad()
def a_users_cache_of_a_stopped_forward_goes_on_or_is_refused(place: str, error: type[BaseException]) -> None:
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
