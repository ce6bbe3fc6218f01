"""Which combinations of families and options `make test` runs, and which are left to `make test-all`.

Every family runs as it comes, every option runs on the representatives, and each other family of ``CORE``
runs under one option more, of those that touch what is its own. A combination that breaks where none of these
does belongs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

REPRESENTATIVES = ("llava_llama", "qwen2_5_vl", "gemma3")
"""Plain causal; positions on three axes; windows, and images that are read both ways."""

ALSO = {
    "llava_mistral": "prefix",  # a window that reaches into what stands before
    "llava_qwen2": "star",
    "llava_tied": "pooled",  # a row that is not written, in a head that shares it
    "internvl": "hide-prefix",
    "idefics3": "bos-sink",  # a block that starts with markers and glue
    "smolvlm": "rival",
}


def combined(combinations: Iterable[tuple], quick: Callable[..., bool]) -> list[Any]:
    """``combinations`` as pytest takes them; those that are not ``quick`` are marked ``matrix``."""
    return [pytest.param(*c, marks=() if quick(*c) else pytest.mark.matrix) for c in combinations]


def in_turn(first: Iterable, second: Iterable) -> list[Any]:
    """All pairs, as pytest takes them. Quick are those of the representatives, and one for each other
    ``first``: the ``second`` take turns.
    """
    first, second = list(first), list(second)
    pairs = [(a, b) for a in first for b in second]
    return combined(pairs, lambda a, b: a in REPRESENTATIVES or second[first.index(a) % len(second)] == b)


def quick_rule(name: str, rule: str, *_: Any) -> bool:
    """Whether ``make test`` runs the family ``name`` under ``rule`` (of ``harness.RULES``)."""
    return rule == "isolated" or name in REPRESENTATIVES or ALSO.get(name) == rule
