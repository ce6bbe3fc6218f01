"""The report of a video stream: how much was seen, how much is kept, and what was lost."""

from __future__ import annotations

from typing import Any

from .budget import KeepAll


def summary(kept_by: KeepAll | None, policy: str | None, frames: int, blocks: int) -> dict[str, Any]:
    """The report of a video of which ``frames`` frames were seen as ``blocks`` blocks.

    Returns:
        ``policy``; ``budget``, ``blocks``, ``kept``, ``dropped`` and ``merged``, counted in blocks;
        ``frames``; ``voco_tokens``, what the kept blocks take of the context; ``nbytes``; ``times`` (seconds,
        one a kept block); ``largest_gap`` (seconds between two neighbours); ``exact``, whether every kept
        block is one that stage 1 has made; and ``text``, all of it as a sentence.
    """
    kept = () if kept_by is None else kept_by.kept
    times = [k.time for k in kept]
    gap = max((b - a for a, b in zip(times, times[1:], strict=False)), default=0.0)
    found: dict[str, Any] = {
        "policy": policy, "budget": None if kept_by is None else kept_by.budget, "frames": frames,
        "blocks": blocks, "kept": len(kept), "dropped": 0 if kept_by is None else kept_by.dropped,
        "merged": 0 if kept_by is None else kept_by.merged,
        "voco_tokens": sum(sum(k.cache.num_tokens) for k in kept),
        "nbytes": sum(k.cache.nbytes for k in kept), "times": times, "largest_gap": gap,
        "exact": not (policy == "average" and kept_by is not None and kept_by.merged),
    }  # fmt: skip
    return {**found, "text": _sentence(found)}


def _sentence(found: dict[str, Any]) -> str:
    if not found["blocks"]:
        return "no frame seen yet"
    times = found["times"]
    text = (
        f"{found['frames']:,} frame(s) seen as {found['blocks']:,} block(s), {found['kept']:,} kept "
        f"({found['voco_tokens']:,} VoCo tokens, {times[0]:.1f} to {times[-1]:.1f} s)"
    )
    if found["policy"] is None:
        return text
    text += f"; policy {found['policy']}, budget {found['budget']:,} blocks"
    if found["dropped"]:
        text += f": {found['dropped']:,} dropped, nothing of them is left"
    elif found["merged"]:
        how = (
            "the mean stands for both (an approximation)" if not found["exact"] else "the earlier one stands"
        )
        text += f": {found['merged']:,} merged into their neighbours, {how}"
    else:
        return text + ": nothing lost"
    return text + f"; at most {found['largest_gap']:.1f} s between two kept blocks"
