"""Time, measured so that ratios can be trusted: in one process, in turn; medians, and medians of ratios."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Way = Callable[[], Callable[[], Any]]
"""Does the set-up and returns the function that is timed."""


def interleaved_times(
    ways: Mapping[str, Way], repeats: int = 30, warm_up: int = 3, limit: float | None = None, least: int = 3
) -> dict[str, list[float]]:
    """Seconds of each of ``ways``, called in turn and in shuffled order, so that drift hits all alike.

    Args:
        repeats: turns that count.
        warm_up: turns before them.
        limit: seconds after which no new turn starts, once ``least`` of them count; ``None``: no limit.

    Returns:
        per way a list of as many seconds as turns were counted; entry ``i`` of each is of the same turn.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    began = time.perf_counter()
    for turn in range(warm_up + repeats):
        done = turn - warm_up
        if limit is not None and done >= least and time.perf_counter() - began > limit:
            break
        for name in order.sample(list(ways), len(ways)):
            call = ways[name]()
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def interleaved_medians(ways: Mapping[str, Way], repeats: int = 30, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each of ``ways``, called in turn and in shuffled order, so that drift hits all alike.

    Each callable does the set-up and returns the function that is timed.
    """
    times = interleaved_times(ways, repeats, warm_up)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """``seconds``: the median of each way; ``ratio``: the median, over the turns, of its time over that of
    ``base`` in the same turn.
    """
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratio = {
        name: statistics.median(a / b for a, b in zip(values, times[base], strict=True))
        for name, values in times.items()
    }
    return {"seconds": seconds, "ratio": ratio}


def synchronised(way: Way, device: Any) -> Way:
    """``way`` whose timed function waits for the device to finish."""
    if str(device).partition(":")[0] != "cuda":
        return way
    import torch

    def made() -> Callable[[], Any]:
        call = way()
        torch.cuda.synchronize(device)

        def run() -> None:
            call()
            torch.cuda.synchronize(device)

        return run

    return made


def flops(call: Callable[[], Any]) -> int:
    """What torch's own counter finds in ``call``: matrix products, convolutions and attention. It counts a
    causal attention call as if it had no mask.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from .._compat import cpu_attention_flops

    with FlopCounterMode(display=False, custom_mapping=cpu_attention_flops()) as counter:
        call()
    return int(counter.get_total_flops())


def product_rate(device: str, dtype: str, size: int = 1024) -> float:
    """FLOPs a second of a square matrix product here and now: the floor that a count of FLOPs stands on."""
    import torch

    kind = getattr(torch, dtype)
    if device != "cpu":
        size *= 4
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    way = synchronised(lambda: lambda: a @ b, device)
    # the fastest: a floor must not rise with what else the machine does
    return 2 * size**3 / min(interleaved_times({"product": way}, repeats=20, warm_up=2)["product"])


def top_operations(call: Callable[[], Any], count: int = 10) -> list[dict[str, Any]]:
    """Where the time of ``call`` goes: torch's operations by their own time, as shares of the whole."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        call()
    averages = seen.key_averages()

    def own(entry: Any) -> float:
        return float(getattr(entry, "self_device_time_total", 0.0) or entry.self_cpu_time_total)

    whole = sum(own(entry) for entry in averages) or 1.0
    ranked = sorted(averages, key=own, reverse=True)[:count]
    return [
        {"operation": e.key, "share": own(e) / whole, "seconds": own(e) / 1e6, "calls": int(e.count)}
        for e in ranked
    ]
