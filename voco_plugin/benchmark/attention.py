"""Attention under the rule, forward and backward: each backend against dense SDPA and plain causal SDPA.

One layer's attention as the model calls it, through the functions registered with transformers: a row of
``N`` tokens, ``H`` heads of ``D``. Masks and plans are built once a forward, so they are timed apart.

FLOPs are counted from pairs (query, key): 4·D·H a pair forward, 10·D·H backward (of five matrix products, one
repeats the scores). ``needed`` pairs are those the rule shows; dense SDPA computes all N².
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config import VoCoConfig
from ..core.attention import register
from ..core.attention.backends import NAMES
from ..core.forward import in_force
from ..core.layout import TokenKind
from ..core.masks import ActiveRule, TokenTable
from .timing import Way, compare, interleaved_times, product_rate, synchronised

PLAIN = "plain causal"
LAYERS = 32
"""Layers that share a mask, where its cost is spread over them (Vicuna-7B's)."""


class _Layer(torch.nn.Module):
    """What transformers' attention functions read of a layer."""

    is_causal = True
    num_key_value_groups = 1


def token_table(frames: int, vision: int, num_tokens: int, text: int, device: str = "cpu") -> TokenTable:
    """A row ``[(vision, VoCo) x frames, text]``."""
    kind = ([TokenKind.VISION] * vision + [TokenKind.VOCO] * num_tokens) * frames + [TokenKind.TEXT] * text
    block = [i for i in range(frames) for _ in range(vision + num_tokens)] + [-1] * text
    order = torch.arange(len(kind))[None]
    return TokenTable(torch.tensor([kind]), torch.tensor([block]), order, ordered=True).to(device)


def needed_pairs(frames: int, vision: int, num_tokens: int, text: int) -> int:
    """Pairs that the rule shows (``isolated``, ``self``): blocks by themselves, text over the stream."""
    block = vision + num_tokens
    before = frames * num_tokens
    return frames * block * (block + 1) // 2 + text * before + text * (text + 1) // 2


def build_mask(backend: str, table: TokenTable, dtype: torch.dtype) -> Any:
    """What the layers get as their mask, made by the registered mask function under the rule."""
    device, tokens = table.kind.device, table.length
    config = VoCoConfig(attention=backend)
    with in_force(ActiveRule(config, table)):
        return ALL_MASK_ATTENTION_FUNCTIONS[_name(backend)](
            batch_size=1, q_length=tokens, kv_length=tokens, q_offset=0, kv_offset=0,
            mask_function=causal_mask_function, attention_mask=None, dtype=dtype, device=device,
            allow_is_causal_skip=True,
        )  # fmt: skip


def _name(backend: str) -> str:
    register()
    known = sorted({attention for attention, _ in NAMES})
    if (backend, "sdpa") not in NAMES:
        raise ValueError(f"backend {backend!r} is not known; use one of {', '.join(known)}.")
    return NAMES[backend, "sdpa"]


def mask_facts(mask: Any) -> dict[str, int | None]:
    """``bytes`` of a mask or plan (index tensors counted) and the ``pairs`` that are computed under it."""
    plan = getattr(mask, "plan", None)
    if plan is not None:
        held = {id(t): t for t in vars(plan).values() if isinstance(t, torch.Tensor)}
        indices = sum(t.numel() * t.element_size() for t in held.values())
        return {"bytes": indices + plan.mask_bytes, "pairs": plan.pairs}
    if isinstance(mask, torch.Tensor):
        return {"bytes": mask.numel() * mask.element_size(), "pairs": mask.shape[-1] * mask.shape[-2]}
    return {"bytes": None, "pairs": None}


def attention_case(
    frames: int, *, vision: int, num_tokens: int, text: int, heads: int, head_dim: int, device: str,
    dtype: str, backends: Sequence[str], repeats: int, limit: float | None, backward: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """One row of the benchmark: times of forward and backward, and of the masks; their sizes and ratios."""
    kind = getattr(torch, dtype)
    table = token_table(frames, vision, num_tokens, text, device)
    tokens = table.length
    draw = torch.Generator().manual_seed(0)
    shape = (1, heads, tokens, head_dim)
    leaves = [torch.randn(shape, generator=draw).to(device, kind).requires_grad_(backward) for _ in range(3)]
    weight = torch.randn(1, tokens, heads, head_dim, generator=draw).to(device, kind)
    masks = {name: build_mask(name, table, kind) for name in backends}
    calls = {name: (ALL_ATTENTION_FUNCTIONS[_name(name)], masks[name]) for name in backends}
    calls[PLAIN] = (ALL_ATTENTION_FUNCTIONS["sdpa"], None)
    layer = _Layer()

    def way(name: str) -> Way:
        function, mask = calls[name]

        def run() -> None:
            out = function(layer, *leaves, mask, scaling=head_dim**-0.5, dropout=0.0)[0]
            if backward:
                out.backward(weight)

        def made() -> Callable[[], Any]:
            for leaf in leaves:
                leaf.grad = None
            return run

        return synchronised(made, device)

    base = backends[0]
    found = compare(
        interleaved_times({name: way(name) for name in calls}, repeats, warm_up=1, limit=limit), base
    )
    building: dict[str, Way] = {
        name: synchronised(lambda name=name: lambda: build_mask(name, table, kind), device)  # type: ignore[misc]
        for name in backends
    }
    built = compare(interleaved_times(building, min(repeats, 5), warm_up=1, limit=limit), base)
    facts = {name: mask_facts(mask) for name, mask in masks.items()}
    pair_flops = (14 if backward else 4) * head_dim * heads
    needed = needed_pairs(frames, vision, num_tokens, text)
    return {
        "frames": frames, "vision_tokens": vision, "num_tokens": num_tokens, "text_tokens": text,
        "tokens": tokens, "seconds": found["seconds"], "faster_than_dense": _inverse(found["ratio"]),
        "mask_seconds": built["seconds"], "mask_bytes": {n: f["bytes"] for n, f in facts.items()},
        "pairs": {n: f["pairs"] for n, f in facts.items()}, "needed_pairs": needed,
        "needed_flops": needed * pair_flops,
    }  # fmt: skip


def _inverse(ratio: dict[str, float]) -> dict[str, float]:
    return {name: 1 / value for name, value in ratio.items()}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The least-squares slope of log y against log x; ``None`` with fewer than two x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    if len({x for x, _ in logs}) < 2:
        return None
    mx, my = (statistics.fmean(values) for values in zip(*logs, strict=True))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def slopes(cases: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Per way, the slope of time against tokens over the cases of one frame size (the commonest)."""
    sizes = [case["vision_tokens"] for case in cases]
    alike = [case for case in cases if case["vision_tokens"] == statistics.mode(sizes)]
    return {name: slope([(c["tokens"], c["seconds"][name]) for c in alike]) for name in cases[0]["seconds"]}


def crossover(
    lengths: Sequence[int], *, share: float = 0.8, layers: int = LAYERS, **settings: Any
) -> dict[str, Any]:
    """From which length of a row with one image ``segmented`` beats ``dense``, its plan and mask included.

    Args:
        lengths: tokens of a row, ``share`` of them vision tokens.
        layers: that share a mask, over which its time is spread.
    """
    points = []
    for tokens in lengths:
        vision = max(int(tokens * share), 1)
        rest: dict[str, Any] = {"vision": vision, "num_tokens": 1, "text": max(tokens - vision - 1, 1)}
        case = attention_case(1, **rest, backends=("dense", "segmented"), **settings)
        whole = {n: case["seconds"][n] + case["mask_seconds"][n] / layers for n in ("dense", "segmented")}
        points.append(
            {"tokens": case["tokens"], "seconds": whole, "faster": whole["dense"] / whole["segmented"]}
        )
    start = None
    for point in reversed(points):  # the first length from which on it always pays
        if point["faster"] < 1:
            break
        start = point["tokens"]
    return {"layers": layers, "vision_share": share, "points": points, "segmented_from": start}


def attention(
    frames: Sequence[int], *, single: int, vision: int, num_tokens: int, text: int, heads: int, head_dim: int,
    device: str, dtype: str, backends: Sequence[str], repeats: int, limit: float | None,
    lengths: Sequence[int] = (), tick: Callable[[str], Any] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark.

    Args:
        frames: numbers of frames of ``vision`` tokens each.
        single: vision tokens of the case with one image; 0 leaves it out.
        lengths: of :func:`crossover`; none leaves it out.
        tick: told what comes next.
    """
    common: dict[str, Any] = {
        "num_tokens": num_tokens, "text": text, "heads": heads, "head_dim": head_dim, "device": device,
        "dtype": dtype, "repeats": repeats, "limit": limit,
    }  # fmt: skip
    cases = []
    rate = product_rate(device, dtype)
    for count, size in [(1, single)] * bool(single) + [(n, vision) for n in frames]:
        tick(f"{count} x {size} vision tokens")
        case = attention_case(count, vision=size, backends=backends, **common)
        case["floor_seconds"] = case["needed_flops"] / rate
        cases.append(case)
    found: dict[str, Any] = {"product_flops_per_second": rate, "cases": cases, "slope": slopes(cases)}
    if lengths:
        tick("from which length segments pay")
        own = {k: v for k, v in common.items() if k not in ("num_tokens", "text")}
        found["crossover"] = crossover(lengths, **own)
    return found
