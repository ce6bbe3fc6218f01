"""Which blocks of a video are kept when there are more than the budget: a policy, applied block by block.

uniform   drop the block whose neighbours stand closest together in time     first and latest always stay
merge     of the two neighbours most alike, keep the earlier                  for both their times
average   of the two neighbours most alike, keep the mean                     an approximation: see there
window    the last blocks as they are, and a uniform summary of those before

A policy holds at most ``budget`` blocks at any time, so its memory is flat over an endless stream. What it
drops is gone. Each step looks only at what is kept, so the result does not depend on how far the stream goes
on.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from dataclasses import dataclass

import torch

from ...cache import VoCoBlock, VoCoCache
from ...config import nearest

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class KeptBlock:
    """A block of a video that is kept.

    Attributes:
        cache: of this one block.
        time, end: seconds of the first and last frame that it stands for.
        frames: how many frames it stands for, those of blocks merged into it included.
        index: its number among the video's blocks.
    """

    cache: VoCoCache
    time: float
    end: float
    frames: int
    index: int


class KeepAll:
    """No budget: every block is kept. Also what the policies share.

    Attributes:
        budget: the most blocks that are kept; ``None``: no limit.
        dropped, merged: blocks that are gone, without a trace or into another.
    """

    name = "all"

    def __init__(self, budget: int | None = None) -> None:
        self.budget, self.dropped, self.merged = budget, 0, 0
        self._kept: list[KeptBlock] = []

    def add(self, block: KeptBlock) -> None:
        """The next block, later than those before it."""
        self._kept.append(block)
        if self.budget is not None and len(self._kept) > self.budget:
            self._shrink()

    @property
    def kept(self) -> tuple[KeptBlock, ...]:
        """In order of time."""
        return tuple(self._kept)

    def _shrink(self) -> None:
        raise NotImplementedError("a policy with a budget says what goes")


class Uniform(KeepAll):
    """Keeps blocks evenly spaced in time: whenever there is one too many, the block between first and last
    whose two neighbours are the least time apart goes (of several, the earliest).
    """

    name = "uniform"

    def _shrink(self) -> None:
        times = [k.time for k in self._kept]
        gaps = [after - before for before, after in zip(times, times[2:], strict=False)]
        del self._kept[1 + min(range(len(gaps)), key=gaps.__getitem__)]
        self.dropped += 1


class Merge(KeepAll):
    """Merges the two neighbours most alike: the earlier block stays as it is, for the times of both.

    Alike: the mean over layers of the cosines of their keys and of their values (:func:`similarity`). The
    block that stays is one that stage 1 has made: nothing is approximated, what the later one held beyond it
    is lost. As the earlier stays, a slow pan is compared with where it began and does not drift away.
    """

    name = "merge"

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self._alike: list[float] = []  # of each block and the next

    def add(self, block: KeptBlock) -> None:
        if self._kept:
            self._alike.append(similarity(self._kept[-1], block))
        super().add(block)

    def _shrink(self) -> None:
        at = max(range(len(self._alike)), key=self._alike.__getitem__)
        self._kept[at : at + 2] = [self._joined(*self._kept[at : at + 2])]
        del self._alike[at]
        self.merged += 1
        for pair in (at - 1, at):
            if 0 <= pair < len(self._alike):
                self._alike[pair] = similarity(*self._kept[pair : pair + 2])

    def _joined(self, first: KeptBlock, second: KeptBlock) -> KeptBlock:
        return dataclasses.replace(first, end=second.end, frames=first.frames + second.frames)


class Average(Merge):
    """As :class:`Merge`, but what stays is the mean of both, weighted by their frames.

    Keys are averaged at the position both were computed at, and values. This is an approximation: the LLM was
    never shown such keys, and attention to a mean is not the mean of two attentions.
    """

    name = "average"

    def _joined(self, first: KeptBlock, second: KeptBlock) -> KeptBlock:
        a, b = first.cache.blocks[0], second.cache.blocks[0]
        facts = [(x.position, x.extent, x.num_vision, x.num_tokens) for x in (a, b)]
        if facts[0] != facts[1]:
            raise ValueError(
                f"policy 'average' cannot join blocks of {a.num_vision} and {b.num_vision} vision tokens "
                "(frames of different sizes); use policy 'merge'."
            )
        share = second.frames / (first.frames + second.frames)

        def mean(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return tuple(
                torch.lerp(x.float(), y.float(), share).to(x.dtype) for x, y in zip(one, other, strict=True)
            )

        block = dataclasses.replace(a, keys=mean(a.keys, b.keys), values=mean(a.values, b.values))
        cache = VoCoCache([block], fingerprint=first.cache.fingerprint)
        return dataclasses.replace(super()._joined(first, second), cache=cache)


class Window(KeepAll):
    """The last blocks all, and before them a :class:`Uniform` summary of everything earlier.

    Args:
        budget: both together; half of it (rounded down) is the window.
    """

    name = "window"

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self.recent = budget // 2
        self._summary = Uniform(budget - self.recent)
        self._window: deque[KeptBlock] = deque()

    def add(self, block: KeptBlock) -> None:
        self._window.append(block)
        if len(self._window) > self.recent:
            self._summary.add(self._window.popleft())
            self.dropped = self._summary.dropped

    @property
    def kept(self) -> tuple[KeptBlock, ...]:
        return (*self._summary.kept, *self._window)


POLICIES: dict[str, type[KeepAll]] = {c.name: c for c in (Uniform, Merge, Average, Window)}
_FEWEST = {"window": 3}


def similarity(first: KeptBlock, second: KeptBlock) -> float:
    """How alike two blocks are, -1 … 1: the cosine of their keys and that of their values, each ``(H, K, D)``
    taken as one vector, averaged over both and over layers, in fp32.

    Blocks that were computed at different positions are compared by their values; blocks of different K are
    not alike (-1).
    """
    a, b = first.cache.blocks[0], second.cache.blocks[0]
    if a.num_tokens != b.num_tokens:
        return -1.0
    pairs = list(zip(a.values, b.values, strict=True))
    if a.position == b.position:
        pairs += zip(a.keys, b.keys, strict=True)
    cosines = [torch.cosine_similarity(x.flatten().float(), y.flatten().float(), dim=0) for x, y in pairs]
    return float(torch.stack(cosines).mean())


def parse_budget(budget: int | str | None) -> tuple[int | None, int | None]:
    """``(blocks, bytes)`` of a budget: a number of blocks, or bytes as text (``"64MB"``, ``"1GiB"``).

    Raises:
        ValueError: it is neither.
    """
    if budget is None:
        return None, None
    text = str(budget).strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", text.upper())
    if found:
        return None, int(float(found[1]) * _UNITS[found[2]])
    if not text.isdigit():
        raise ValueError(f"budget={budget!r} is neither a number of blocks nor of bytes; give 64, or '64MB'.")
    return int(text), None


def check_policy(policy: str | None, budget: int | str | None) -> str | None:
    """The policy's name, ``uniform`` where none is given with a budget; ``None`` without a budget.

    Raises:
        ValueError: an unknown policy, or one without a budget.
    """
    if policy is not None and policy not in POLICIES:
        raise ValueError(
            f"policy={policy!r} is not known; use one of {', '.join(POLICIES)}{nearest(policy, POLICIES)}."
        )
    if policy is not None and budget is None:
        raise ValueError(f"policy={policy!r} needs a budget: give the most blocks that are kept.")
    return None if budget is None else policy or "uniform"


def make_policy(policy: str | None, budget: int | str | None, block: VoCoBlock) -> KeepAll:
    """The policy, empty. A budget in bytes is counted in blocks of the size of ``block``.

    Raises:
        ValueError: an unknown policy, or a budget of too few blocks.
    """
    name = check_policy(policy, budget)
    if name is None:
        return KeepAll()
    blocks, size = parse_budget(budget)
    if blocks is None:
        assert size is not None
        blocks = size // block.nbytes
    fewest = _FEWEST.get(name, 2)
    if blocks < fewest:
        raise ValueError(
            f"budget={budget!r} holds {blocks} block(s) of {block.nbytes:,} bytes; policy {name!r} needs at "
            f"least {fewest}."
        )
    return POLICIES[name](blocks)
