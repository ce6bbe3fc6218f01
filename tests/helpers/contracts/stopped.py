"""What tests/core/test_state_forward.py and test_state_wrappers.py hold of forwards that are stopped, and of
those inside others; run on broken versions too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from states import (
    ASKED,
    Once,
    World,
    answers,
    ask,
    disturbed,
    equal,
    expected,
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
