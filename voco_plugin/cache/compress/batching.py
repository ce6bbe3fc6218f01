"""Which blocks share a forward in stage 1: those of one length, as many as the caller's limits allow.

    blocks     0: 9+2   1: 25+2   2: 9+2   3: 9+1          vision + VoCo tokens
    forwards   [0, 2]   [1]   [3]                          no row is padded

Blocks whose vision inputs cannot be told apart (a *bundle*, see ``pixels.py``) always share one; only there,
rows of different lengths are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...core.layout import BlockSpan, SequenceLayout
from .memory import readable, working_memory
from .vision_inputs import VisionInputs

Bundle = tuple[int, int]


@dataclass(frozen=True)
class Limits:
    """What one forward may take.

    Args:
        max_memory: bytes of working memory, on top of the weights, as estimated (see ``memory.py``).
        max_batch_tokens: vision and VoCo tokens.
        max_blocks: blocks (``stage1_chunk`` of a training).

    Raises:
        ValueError: a limit is not an integer of at least 1.
    """

    max_memory: int | None = None
    max_batch_tokens: int | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_memory", "max_batch_tokens", "max_blocks"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1, or None for no limit.")

    def bundles(
        self,
        model: torch.nn.Module,
        tokens: int,
        kept: int,
        pixels: int,
        rows: int,
        whole: bool,
        why: str | None,
    ) -> int | None:
        """How many bundles of ``rows`` rows of ``tokens`` tokens fit; ``None`` where nothing limits them.

        Raises:
            ValueError: not even one fits.
        """
        fits: list[int] = []
        blocks = "one image" if rows == 1 else f"{rows} images that run together"
        apart = f" ({why})" if rows > 1 and why else ""
        fix = "give fewer images at once, or raise" if rows > 1 else "raise"
        if self.max_memory is not None:
            need = working_memory(model, tokens, kept, pixels, rows=rows, whole=whole)
            if need > self.max_memory:
                raise ValueError(
                    f"max_memory={self.max_memory} ({readable(self.max_memory)}) is too little: {blocks} of "
                    f"{tokens} tokens{apart} take about {need} ({readable(need)}); {fix} max_memory."
                )
            fits.append(self.max_memory // need)
        if self.max_batch_tokens is not None:
            if rows * tokens > self.max_batch_tokens:
                raise ValueError(
                    f"max_batch_tokens={self.max_batch_tokens} is too little: {blocks} of {tokens} tokens"
                    f"{apart} have {rows * tokens}; {fix} max_batch_tokens."
                )
            fits.append(self.max_batch_tokens // (rows * tokens))
        if self.max_blocks is not None:
            if rows > self.max_blocks:
                raise ValueError(
                    f"stage1_chunk={self.max_blocks} is too little: {rows} images run together{apart}; "
                    f"set it to {rows} or more, or give fewer images at once."
                )
            fits.append(self.max_blocks // rows)
        return min(fits) if fits else None

    def check_whole(self, model: torch.nn.Module, layout: SequenceLayout, vision: VisionInputs) -> None:
        """Refuse a batch that runs as it is and does not fit (``block_context="prefix"``)."""
        pixels = _pixels(vision, [(0, len(layout.spans))]) // layout.num_rows + 1
        tokens = max(s.stop for s in layout)
        self.bundles(model, tokens, 0, pixels, layout.num_rows, True, vision.reason)


def _pixels(vision: VisionInputs, bundles: Sequence[Bundle]) -> int:
    """How many values the vision inputs of these bundles have."""
    return sum(v.numel() for v in vision.take(bundles).values() if isinstance(v, torch.Tensor))


def chunks_of(
    model: torch.nn.Module,
    spans: Sequence[BlockSpan],
    vision: VisionInputs,
    limits: Limits,
    wanted: set[int] | None = None,
) -> list[list[Bundle]]:
    """The bundles of each forward. Every block is in one of them; within one, blocks keep their order.

    Args:
        wanted: the blocks to run, by number: bundles that hold none of them are left out. ``None``: all.

    Raises:
        ValueError: a bundle does not fit the limits.
    """
    groups: dict[tuple, list[Bundle]] = {}
    for bundle in vision.bundles:
        if wanted is not None and wanted.isdisjoint(range(*bundle)):
            continue
        lengths = tuple((spans[n].num_vision, spans[n].num_voco) for n in range(*bundle))
        key = lengths if len(set(lengths)) > 1 else (lengths[0], len(lengths))
        groups.setdefault(key, []).append(bundle)
    chunks = []
    for bundles in groups.values():
        inside = [spans[n] for n in range(*bundles[0])]
        tokens, kept = max(s.stop - s.start for s in inside), max(s.num_voco for s in inside)
        shared = bool(getattr(model.config.get_text_config(), "num_kv_shared_layers", 0))
        whole = shared or len({(s.num_vision, s.num_voco) for s in inside}) > 1
        counts = limits.max_memory is not None
        pixels = max(_pixels(vision, [b]) for b in bundles) // len(inside) + 1 if counts else 0
        size = limits.bundles(model, tokens, kept, pixels, len(inside), whole, vision.reason)
        size = size or len(bundles)
        chunks += [bundles[i : i + size] for i in range(0, len(bundles), size)]
    return chunks
