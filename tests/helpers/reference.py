"""The plainest reading of the rule's table: loops over (query, key), written without the package's own
predicate.

Letters: ``v`` vision, ``C`` VoCo, ``t`` text, ``.`` padding; ``g`` glue and ``b`` BOS are resolved by regular
expression, not by the package's run-length reader.
"""

from __future__ import annotations

import re

import torch

_BLOCK = re.compile(r"v(?:[vg]*v)?C+")
_SINK_BLOCK = re.compile(r"bv(?:[vg]*v)?C+")


def letters(ids, mask, *, vision, voco, glue=(), bos=None) -> str:
    """One letter per token of a row."""
    out = []
    for token, real in zip(ids, mask, strict=True):
        if not real:
            out.append(".")
        elif token in vision:
            out.append("v")
        elif token == voco:
            out.append("C")
        elif token in glue:
            out.append("g")
        elif token == bos:
            out.append("b")
        else:
            out.append("t")
    return "".join(out)


def read(row: str, sink: bool = False) -> tuple[str, list[int]]:
    """Letters with only ``v C t .`` left, and the block of each token (-1 outside)."""
    kinds, block = list(row), [-1] * len(row)
    for number, match in enumerate((_SINK_BLOCK if sink else _BLOCK).finditer(row)):
        for i in range(*match.span()):
            kinds[i] = "C" if row[i] == "C" else "v"
            block[i] = number
    return "".join("t" if k in "gb" else k for k in kinds), block


def rule_mask(
    row: str, *, rule="isolated", block_context="self", hide_prefix=False, sink=False, compressor="voco"
) -> torch.Tensor:
    """What the rule shows, ``(N, N)`` bool, before causality and padding: the table, cell by cell."""
    kinds, block = read(row, sink)
    n = len(row)
    first_voco = kinds.find("C")
    shown = torch.ones(n, n, dtype=torch.bool)
    if rule == "causal":
        return shown
    for i in range(n):
        for j in range(n):
            if block[i] < 0:  # text
                visible = kinds[j] != "v"
                if hide_prefix and first_voco >= 0 and i > first_voco and j < first_voco:
                    visible = False
            elif kinds[j] == "v":
                visible = block[j] == block[i]
            elif block[j] == block[i]:
                visible = True
            else:
                visible = block_context == "prefix"
            if rule == "star" and kinds[i] == "v" and i != j:
                visible = False
            if compressor != "voco" and block[i] >= 0:  # the image is in the embeddings
                before = block[i] != block[j] and block_context == "prefix"
                visible = i == j or (kinds[i] == "C" and kinds[j] != "v" and (block[i] == block[j] or before))
            shown[i, j] = visible
    return shown


def base_mask(
    row: str,
    *,
    window: int | None = None,
    chunk: int | None = None,
    groups: list[int] | None = None,
    groups_past_window: bool = False,
) -> torch.Tensor:
    """The backbone's own mask: causal, windowed or in chunks, bidirectional within ``groups``, no padding
    keys. ``(N, N)``.

    Gemma 3 and 4 window their image blocks too; PaliGemma 2 does not (``groups_past_window``). Chunks count
    from the first real token.
    """
    n = len(row)
    first = n - len(row.lstrip("."))
    shown = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            both_ways = groups is not None and groups[i] >= 0 and groups[i] == groups[j]
            near = window is None or i - j < window
            near = near and (chunk is None or (i - first) // chunk == (j - first) // chunk)
            near = near or (both_ways and groups_past_window)
            shown[i, j] = (j <= i or both_ways) and near and row[j] != "."
    return shown


def compact_numbers(row: str, sink: bool = False) -> list[int | None]:
    """1-D compact positions by walking the row: text and VoCo counted, V just before its C; ``None`` for
    padding.
    """
    kinds, block = read(row, sink)
    numbers: list[int | None] = [None] * len(row)
    stream = 0
    for i, kind in enumerate(kinds):
        if kind in "tC":
            numbers[i] = stream
            stream += 1
    for b in set(block) - {-1}:
        members = [i for i in range(len(row)) if block[i] == b]
        vision = [i for i in members if kinds[i] == "v"]
        first = numbers[next(i for i in members if kinds[i] == "C")]
        for k, i in enumerate(vision):
            numbers[i] = first - len(vision) + k
    return numbers
