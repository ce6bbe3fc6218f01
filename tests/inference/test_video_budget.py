"""Each policy keeps exactly what a plain reference keeps, within its budget at every step."""

from __future__ import annotations

import random

import pytest
import torch

from voco_plugin.cache import VoCoBlock, VoCoCache
from voco_plugin.inference.streaming.budget import (
    POLICIES,
    KeptBlock,
    check_policy,
    make_policy,
    parse_budget,
    similarity,
)


def block(seed: int, position: int = 5, tokens: int = 2, like: int | None = None) -> VoCoBlock:
    """Random keys and values of two layers; near those of block ``like`` where that is given."""
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, tokens, 4, generator=draw) for _ in range(4)]
    if like is not None:
        base = block(like, position, tokens)
        whole = (*base.keys, *base.values)
        parts = [w + 0.1 * p for w, p in zip(whole, parts, strict=True)]
    return VoCoBlock(tuple(parts[:2]), tuple(parts[2:]), position, 9, 9)


def series(times, blocks=None) -> list[KeptBlock]:
    blocks = blocks or [block(n) for n in range(len(times))]
    return [
        KeptBlock(VoCoCache([b], fingerprint={"model": "x"}), t, t, 1, n)
        for n, (b, t) in enumerate(zip(blocks, times, strict=True))
    ]


def run(policy: str, budget: int, items: list[KeptBlock]):
    """The indices kept after every step, and the policy."""
    found = make_policy(policy, budget, items[0].cache.blocks[0])
    steps = []
    for item in items:
        found.add(item)
        assert len(found.kept) <= budget
        steps.append([k.index for k in found.kept])
    return steps, found


def irregular(count: int, seed: int) -> list[float]:
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += draw.choice([0.04, 0.5, 1.0, 1.0, 7.0])
    return times


def plain_uniform(times: list[float], budget: int) -> list[list[int]]:
    """Every way of leaving one inner block out; the one whose hole is the smallest."""
    kept: list[int] = []
    steps = []
    for number in range(len(times)):
        kept = [*kept, number]
        if len(kept) > budget:
            ways = []
            for out in kept[1:-1]:
                rest = [k for k in kept if k != out]
                before = max(k for k in rest if k < out)
                after = min(k for k in rest if k > out)
                ways.append((times[after] - times[before], out, rest))
            kept = min(ways)[2]
        steps.append(kept)
    return steps


@pytest.mark.parametrize("budget", [2, 3, 5, 16])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_uniform_is_the_plain_reference(budget, seed):
    times = [n * 0.5 for n in range(120)] if seed is None else irregular(120, seed)
    steps, found = run("uniform", budget, series(times))
    assert steps == plain_uniform(times, budget)
    assert found.dropped == 120 - budget and found.merged == 0
    assert all(step[0] == 0 and step[-1] == number for number, step in enumerate(steps))


def test_uniform_is_evenly_spaced_at_every_moment():
    """The widest hole between two kept blocks is less than three times an even spacing, at any length."""
    times = [float(n) for n in range(1000)]
    for budget in (4, 16, 33):
        steps, _ = run("uniform", budget, series(times, [block(0)] * 1000))
        for number, step in enumerate(steps[budget:], start=budget):
            widest = max(b - a for a, b in zip(step, step[1:], strict=False))
            assert widest <= 3 * number / (budget - 1) + 1, (budget, number)


def test_uniform_in_words():
    steps, _ = run("uniform", 4, series([float(n) for n in range(9)]))
    assert steps[4:] == [[0, 2, 3, 4], [0, 2, 4, 5], [0, 2, 4, 6], [0, 2, 4, 7], [0, 4, 7, 8]]


def cosine(a: VoCoBlock, b: VoCoBlock) -> float:
    """In Python's own arithmetic."""
    found = []
    for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
        x, y = x.flatten().tolist(), y.flatten().tolist()
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        found.append(dot / (sum(p * p for p in x) ** 0.5 * sum(q * q for q in y) ** 0.5))
    return sum(found) / len(found)


@pytest.mark.parametrize("policy", ["merge", "average"])
def test_merging_is_the_plain_reference(policy):
    scenes = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 0, 0, 1, 4, 4, 4]
    blocks = [block(100 + n, like=scene) for n, scene in enumerate(scenes)]
    times = [float(n) for n in range(len(blocks))]
    steps, found = run(policy, 5, series(times, blocks))
    kept: list[tuple[VoCoBlock, int, int, float]] = []  # block, index, frames, end
    for number, one in enumerate(blocks):
        kept.append((one, number, 1, times[number]))
        if len(kept) > 5:
            alike = [cosine(kept[i][0], kept[i + 1][0]) for i in range(5)]
            at = alike.index(max(alike))
            (first, index, n, _), (second, _, m, end) = kept[at], kept[at + 1]
            if policy == "average":
                keys, values = (
                    tuple((n * x + m * y) / (n + m) for x, y in zip(*pair, strict=True))
                    for pair in ((first.keys, second.keys), (first.values, second.values))
                )
                first = VoCoBlock(keys, values, first.position, 9, 9)
            kept[at : at + 2] = [(first, index, n + m, end)]
        assert steps[number] == [k[1] for k in kept]
    assert [(k.frames, k.end) for k in found.kept] == [k[2:] for k in kept]
    assert found.merged == len(blocks) - 5 and sum(k.frames for k in found.kept) == len(blocks)
    for mine, (plain, *_) in zip(found.kept, kept, strict=True):
        for x, y in zip(mine.cache.blocks[0].keys, plain.keys, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=0)
    if policy == "merge":  # nothing is approximated
        assert all(k.cache.blocks[0] is blocks[k.index] for k in found.kept)


def test_window_is_the_last_and_a_summary():
    times = irregular(60, 3)
    steps, found = run("window", 9, series(times))
    for number, step in enumerate(steps):
        recent = list(range(max(0, number - 3), number + 1))  # 9 // 2 of them
        before = plain_uniform(times[: recent[0]], 5)
        assert step == [*(before[-1] if before else []), *recent]
    assert found.dropped == 60 - 9


def test_similarity_is_of_like_blocks():
    a, b, near = block(0), block(1), block(2, like=0)
    (x, y, z) = series([0.0, 1.0, 2.0], [a, b, near])
    assert similarity(x, x) == pytest.approx(1.0) and similarity(x, z) > 0.9 > similarity(x, y)
    assert similarity(x, y) == pytest.approx(cosine(a, b), abs=1e-6)
    (moved,) = series([0.0], [block(0, position=9)])  # keys are turned otherwise: values alone
    assert similarity(x, moved) == pytest.approx(1.0)
    (longer,) = series([0.0], [block(0, tokens=3)])
    assert similarity(x, longer) == -1.0


def test_a_mean_of_unlike_blocks_is_refused():
    items = series([0.0, 1.0, 2.0], [block(0), block(0, position=6), block(0, position=7)])
    with pytest.raises(ValueError, match="use policy 'merge'"):
        run("average", 2, items)


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        ("unifrm", 4, "did you mean 'uniform'"),
        ("merge", None, "needs a budget"),
        ("uniform", 1, "holds 1 block"),
        ("window", 2, "needs at least 3"),
        ("uniform", "4 frames", "neither a number of blocks nor of bytes"),
        ("uniform", -3, "neither"),
    ],
)
def test_what_is_no_budget_says_so(policy, budget, message):
    with pytest.raises(ValueError, match=message):
        make_policy(policy, budget, block(0))


def test_budgets_in_words():
    assert parse_budget("64") == (64, None) and parse_budget(None) == (None, None)
    assert parse_budget("64MB") == (None, 64_000_000) and parse_budget("1.5 GiB") == (None, 1610612736)
    assert check_policy(None, None) is None and check_policy(None, 8) == "uniform"
    assert set(POLICIES) == {"uniform", "merge", "average", "window"}


def test_bytes_are_counted_in_blocks():
    assert block(0).nbytes == 256
    assert make_policy("uniform", "1KB", block(0)).budget == 3
