"""`make test` leaves out no family and no option, and `make test-all` runs what it leaves out."""

from __future__ import annotations

import re

import pytest

from harness import CORE, RULES
from matrix import ALSO, REPRESENTATIVES, combined, in_turn, quick_rule
from paths import ROOT
from tiny import NAMES


def quick(params: list) -> list[tuple]:
    return [p.values for p in params if not p.marks]


def test_every_family_of_the_core_runs_under_more_than_one_rule() -> None:
    assert {*REPRESENTATIVES, *ALSO} == set(CORE) and not {*REPRESENTATIVES} & {*ALSO}
    assert set(ALSO.values()) <= {*RULES} - {"isolated"}


def test_make_test_runs_every_family_as_it_comes_and_every_rule_on_the_representatives() -> None:
    run = set(quick(combined([(n, r) for n in NAMES for r in RULES], quick_rule)))
    assert {(n, "isolated") for n in NAMES} | {(n, r) for n in REPRESENTATIVES for r in RULES} <= run


@pytest.mark.parametrize("options", [["a"], ["a", "b", "c"], ["a", "b", "c", "d", "e"]])
def test_taking_turns_leaves_out_no_family_and_no_option(options: list[str]) -> None:
    run = quick(in_turn(NAMES, options))
    assert {n for n, _ in run} == set(NAMES) and {o for _, o in run} == set(options)
    assert {(n, o) for n in REPRESENTATIVES for o in options} <= set(run)


def test_what_make_test_leaves_out_has_a_command() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    left_out = set(re.findall(r"not (\w+)", re.search(r'addopts = "(.*)"', project)[1]))
    commands = (ROOT / "Makefile").read_text(encoding="utf-8")
    run = set(re.findall(r'-m "?(\w+)', "\n".join(x for x in commands.splitlines() if "pytest" in x.lower())))
    assert left_out == {"matrix", "slow"} and left_out <= run, "a test that no command runs"
