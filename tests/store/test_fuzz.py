"""Mutated files and records: VoCoCacheError, or exactly what they say; never a crash, hang or much memory.

Which mutations there are is in mutations.py; `python tests/helpers/fuzzing.py 20000 0` prints the counts.
"""

from __future__ import annotations

import random
import sys

import pytest

from fuzzing import corpus, fuzz, outcome
from mutations import BLIND, FORGED, sealed
from stores import header_of
from voco_plugin.cache.cache import cache_from_buffer


def check_reached(found: dict, inputs: int) -> None:
    """The checks were reached: of every kind some are refused, of the forged some pass."""
    for kind in ("file", "record"):
        assert found["totals"][f"{kind} refused"] > 0.7 * inputs / 2
        assert found["totals"][f"{kind} as it says"] > 0


def test_mutated_files_and_records_are_refused_or_right():
    found = fuzz(600, seed=1)  # raises at the first outcome that is neither
    assert sum(found["totals"].values()) == 600
    check_reached(found, 600)


@pytest.mark.slow
def test_20_000_mutated_files_and_records_are_refused_or_right(capsys):
    found = fuzz(24_000, seed=0)
    with capsys.disabled():
        sys.stdout.write(f"\n{found['totals']}\n")
    assert sum(found["totals"].values()) == 24_000
    check_reached(found, 24_000)
    seen = {name.split()[1] for name in found["by_mutation"]}
    assert seen == {mutation.__name__ for mutation in (*BLIND, *FORGED)}


def test_the_same_seed_gives_the_same_inputs():
    data = corpus()
    for mutation in (*BLIND, *FORGED):
        a, b = (mutation(random.Random(5), data[0], data[3]) for _ in range(2))
        assert a == b


@pytest.mark.parametrize("number", range(10))
def test_a_sealed_file_is_one_that_is_read(number):
    """Else the forged inputs would stop at the checksum, and try nothing behind it."""
    data = corpus()[number]
    header, start = header_of(data)
    record = header["__metadata__"]["voco"]
    original = cache_from_buffer(data)
    again = sealed({**header, "__metadata__": {"voco": "", "sha256": ""}}, record, data[start:])
    assert outcome(lambda: cache_from_buffer(again), again, original, forged=False) == "equal"


def test_what_goes_wrong_is_seen():
    """The harness can fail: wrong data, another error, a crash, too much memory."""
    data = corpus()[0]
    original, other = cache_from_buffer(data), cache_from_buffer(corpus()[1])
    with pytest.raises(AssertionError, match="read as another cache"):
        outcome(lambda: other, data, original, forged=False)
    with pytest.raises(AssertionError, match="KeyError"):
        outcome(lambda: {}["x"], data, original, forged=False)
