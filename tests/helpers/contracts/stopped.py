"""What tests/core/test_state_forward.py and test_state_wrappers.py hold of forwards that are stopped, and of
those inside others; run on broken versions too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from states import (
    ASKED,
    IN_TWO_STAGES,
    Once,
    World,
    answers,
    ask,
    disturbed,
    equal,
    expected,
    frozen_world,
    in_a_thread,
    passages,
    raises,
    world,
)
from voco_plugin.core.forward import running_forward


class Stopped(BaseException):
    """What no ``except Exception`` sees."""


ERRORS = {
    "ctrl-c": KeyboardInterrupt,
    "exit": SystemExit,
    "closed": GeneratorExit,
    "cancelled": asyncio.CancelledError,
    "own": Stopped,
    "ordinary": RuntimeError,
}
SOME = ("text", "single-pass", "compress")


def other() -> World:
    """Another model in the same process: other layers, another rule."""
    return world("llava_mistral", "star")


def stopped(w: World, what: str, place: str, error: type[BaseException], at: int) -> None:
    """Ask, and be stopped at the ``at``-th passage of ``place``."""
    with disturbed(w.model, place, Once(raises(error), at)), pytest.raises(error, match="stopped here"):
        ask(w, what)


@torch.no_grad()
def decoded(w: World) -> torch.Tensor:
    """Text read by the decoder alone. No forward of ours sets a rule of its own here: one left in force is
    seen.
    """
    return w.model.get_decoder()(**{key: w.text[key] for key in ("input_ids", "attention_mask")})[0]


def nothing_runs(*worlds: World) -> None:
    """No forward counts as running in this thread, and none is under the rule of one that ended."""
    assert running_forward() is None, "a forward that ended still counts as running"
    for w in worlds:
        equal(decoded(w), in_a_thread(decoded)(w))


def check_undisturbed(w: World) -> None:
    """This thread answers as a thread in which nothing was ever stopped."""
    nothing_runs(w, other())
    equal(answers(w, SOME), expected(w, SOME))
    equal(answers(other(), SOME), expected(other(), SOME))


@in_a_thread
def a_stopped_forward_leaves_nothing_behind(error: str) -> None:
    for what in ("single-pass", "compress"):
        stopped(world(), what, "layer-after", ERRORS[error], 1)
        check_undisturbed(world())


def a_forward_stopped_in_one_thread_disturbs_no_other(what: str) -> None:
    """One thread stands inside its forward while another asks; it is stopped, and both ask again."""
    asked, what = (IN_TWO_STAGES, "compress") if what == "frozen" else (tuple(ASKED), what)
    w = frozen_world() if asked is IN_TWO_STAGES else world()
    before = in_a_thread(answers)(w, asked)
    inside, go_on, mine = threading.Event(), threading.Event(), threading.get_ident()

    def wait_and_stop() -> None:
        if threading.get_ident() != mine:
            inside.set()
            assert go_on.wait(60)
            raise KeyboardInterrupt("stopped here")

    with ThreadPoolExecutor(1) as pool:
        with disturbed(w.model, "layer-after", wait_and_stop):
            running = pool.submit(ask, w, what)
            assert inside.wait(60)
            equal(answers(w, asked), before)
            go_on.set()
            assert isinstance(running.exception(), KeyboardInterrupt)
        equal(answers(w, asked), before)
        equal(pool.submit(answers, w, asked).result(), before)
        pool.submit(check_undisturbed, world()).result()


def two_forwards_that_overlap_are_as_alone(first: str, second: str, place: str) -> None:
    """One goes in first and comes out first, the other in between and after: in threads of their own."""
    w, asked = world(), (first, second)
    alone = [expected(w, (what,))[what] for what in asked]
    inside, go_on = ([threading.Event() for _ in asked] for _ in range(2))
    mine = threading.local()

    def wait() -> None:
        number, mine.number = getattr(mine, "number", None), None
        if number is not None:  # once a thread
            inside[number].set()
            assert go_on[number].wait(60)

    def run(number: int) -> list[torch.Tensor]:
        mine.number = number
        return ask(w, asked[number])

    with ThreadPoolExecutor(2) as pool, disturbed(w.model, place, wait):
        running = []
        for number in range(2):
            running.append(pool.submit(run, number))
            assert inside[number].wait(60)
        for number in range(2):
            go_on[number].set()
            running[number].exception(60)
    equal([one.result() for one in running], alone)


# -- one inside another
# ------------------------------------------------------------------------------------------------------------


def refused(w: World) -> list[torch.Tensor]:
    """Refused before anything runs; the user goes on."""
    odd = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask must be the 2-D padding mask"):
        w.model(**{**w.batch, "attention_mask": odd})
    return []


def refused_by_a_users_hook(w: World) -> list[torch.Tensor]:
    """A pre-hook of the user's, before all others, that does not let this batch through."""
    handle = w.model.base_model.register_forward_pre_hook(lambda *_: raises(ValueError)(), prepend=True)
    try:
        with torch.no_grad(), pytest.raises(ValueError, match="stopped here"):
            w.model(**w.batch)
    finally:
        handle.remove()
    return []


def interrupted(w: World) -> list[torch.Tensor]:
    stopped(w, "single-pass", "layer-before", KeyboardInterrupt, 1)
    return []


def failed(w: World) -> list[torch.Tensor]:
    stopped(w, "stage-two", "head", RuntimeError, 1)
    return []


INNER: dict[str, Callable[[World], list[torch.Tensor]]] = {
    **{what: (lambda w, what=what: ask(w, what)) for what in ASKED},
    "refused": refused,
    "refused-by-a-hook": refused_by_a_users_hook,
    "interrupted": interrupted,
    "failed": failed,
}


def check_nested(
    outer: World, inner: World, what: str, place: str, nested: str, run: Any = lambda act: act()
) -> None:
    """``what`` of ``outer`` with ``nested`` of ``inner`` inside it: both as alone."""
    count = passages(outer, what, place)
    for at in {1, count} & set(range(1, count + 1)):
        once = Once(lambda: run(lambda: INNER[nested](inner)), at)
        with disturbed(outer.model, place, once):
            found = ask(outer, what)
        assert once.result is not None, "the forward inside did not end"
        if nested in ASKED:
            equal(once.result, expected(inner, (nested,))[nested])
        equal(found, expected(outer, (what,))[what])


@in_a_thread
def a_forward_inside_another_changes_neither(what: str, nested: str) -> None:
    for place in ("tower", "layer-after"):
        check_nested(world(), world(), what, place, nested)
