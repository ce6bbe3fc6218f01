"""Bootstrap intervals: against loops, against the normal approximation, paired where methods are compared."""

from __future__ import annotations

import numpy as np
import pytest

from voco_plugin.evaluation import intervals
from voco_plugin.evaluation.intervals import Resampler, bootstrap, bootstrap_difference, interval

RNG = np.random.default_rng(7)


def answers(share: float, seeds: int, questions: int, rng: np.random.Generator = RNG) -> np.ndarray:
    return (rng.random((seeds, questions)) < share).astype(int)


def test_replicates_are_means_over_drawn_questions_and_drawn_seeds() -> None:
    """The plainest reference: draw by draw, question by question."""
    correct = answers(0.6, 3, 11)
    draws = Resampler(11, resamples=20, seed=4)
    found = draws.means(correct, "a")
    counts = np.concatenate(list(draws._draw()))
    assert (counts.sum(axis=1) == 11).all()
    seeds = np.random.default_rng(
        [4, 1, int.from_bytes(__import__("hashlib").sha256(b"a").digest()[:4], "big")]
    )
    chosen = seeds.integers(3, size=(20, 3))
    for replicate in range(20):
        values = []
        for seed in chosen[replicate]:
            for question in range(11):
                values += [correct[seed, question]] * int(counts[replicate, question])
        assert found[replicate] == pytest.approx(np.mean(values), abs=1e-6)


def test_one_seed_gives_the_interval_of_a_share() -> None:
    """Of 2,000 questions, 70 % right: the normal approximation, 1.96 sqrt(p (1 - p) / n) each side."""
    correct = np.r_[np.ones(1400), np.zeros(600)]
    low, high = bootstrap(correct)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 2000)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.002)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for number in range(300):
        low, high = bootstrap(answers(0.4, 1, 150, rng), resamples=300, seed=number)
        held += low <= 0.4 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_seeds_that_differ_widen_the_interval() -> None:
    same = np.tile(answers(0.5, 1, 500), (3, 1))
    apart = np.stack([np.r_[np.ones(n), np.zeros(500 - n)] for n in (150, 250, 350)])
    narrow, wide = bootstrap(same), bootstrap(apart)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_questions_are_drawn_once_for_all_seeds() -> None:
    """Three seeds with the same answers say no more than one: nothing shrinks by their number."""
    one = answers(0.5, 1, 400)
    assert bootstrap(np.tile(one, (3, 1))) == pytest.approx(bootstrap(one), abs=1e-6)


def test_a_difference_is_paired_over_questions() -> None:
    """Two methods that fail on the same questions, but for 20: told apart, though their intervals overlap."""
    a = answers(0.5, 1, 400)[0]
    b = a.copy()
    b[np.flatnonzero(a == 1)[:20]] = 0
    low, high = bootstrap_difference(a, b)
    assert 0 < low < 0.05 < high
    assert bootstrap(b)[1] > bootstrap(a)[0], "unpaired, nothing could be said"
    assert bootstrap_difference(b, a) == pytest.approx((-high, -low), abs=2e-3)


def test_equal_methods_are_told_apart_as_rarely_as_the_level_says() -> None:
    rng = np.random.default_rng(3)
    apart = 0
    for number in range(200):
        low, high = bootstrap_difference(
            answers(0.5, 1, 200, rng), answers(0.5, 1, 200, rng), resamples=300, seed=number
        )
        apart += low > 0 or high < 0
    assert apart / 200 <= 0.09


def test_groups_are_drawn_whole_and_widen_what_hangs_together() -> None:
    by_image = answers(0.5, 1, 50)[0]
    correct, groups = np.repeat(by_image, 8), np.repeat(np.arange(50), 8)
    alone, grouped = bootstrap(correct), bootstrap(correct, groups=groups)
    assert (grouped[1] - grouped[0]) == pytest.approx(np.sqrt(8) * (alone[1] - alone[0]), rel=0.15)
    counts = np.concatenate(list(Resampler(400, groups=[f"g{g}" for g in groups])._draw()))
    assert (counts.reshape(-1, 50, 8) == counts.reshape(-1, 50, 8)[:, :, :1]).all()
    assert bootstrap(correct, groups=np.arange(400)) == pytest.approx(alone, abs=1e-6)


def test_large_sets_are_drawn_in_pieces_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = answers(0.5, 2, 90)
    whole = Resampler(90, resamples=50).means(correct, "a")
    monkeypatch.setattr(intervals, "_KEPT", 1)
    monkeypatch.setattr(intervals, "_AT_A_TIME", 700)  # seven replicates at a time
    draws = Resampler(90, resamples=50)
    assert draws._kept is None
    assert np.array_equal(draws.means(correct, "a"), whole) and np.array_equal(
        draws.means(correct, "a"), whole
    )


def test_what_a_bootstrap_cannot_take_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        Resampler(0)
    with pytest.raises(ValueError, match="2 groups for 3 questions"):
        Resampler(3, groups=[1, 2])
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        Resampler(3).means([1, 0, 1, 1])
    with pytest.raises(ValueError, match="all numbers"):
        interval([0.5, float("nan")])
    with pytest.raises(ValueError, match="level=95"):
        interval([0.5], 95)
