"""The mask of one sample as a picture, drawn from the same dense mask that the tests compare the kernels
with.

Rows are queries, columns keys; a cell is filled, in the colour of the key, where the query sees the key.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ...config import VoCoConfig
from ...core.layout import SequenceLayout, TokenKind
from ...core.masks import dense_mask, draw_mask
from ...files import atomic_path

COLOURS = {
    TokenKind.PAD: (224, 224, 224),
    TokenKind.TEXT: (66, 133, 184),
    TokenKind.VISION: (242, 153, 56),
    TokenKind.VOCO: (46, 160, 67),
}
NAMES = {TokenKind.TEXT: "text", TokenKind.VISION: "vision", TokenKind.VOCO: "VoCo", TokenKind.PAD: "padding"}
HIDDEN = (250, 250, 250)
MAX_TEXT_TOKENS = 72


def draw_mask_png(
    config: VoCoConfig, layout: SequenceLayout, path: str | Path, row: int = 0, title: str = ""
) -> Path:
    """Write the mask of one row of ``layout`` to ``path`` (PNG) and return the path.

    Raises:
        ValueError: the layout has no such row.
    """
    if not 0 <= row < layout.num_rows:
        raise ValueError(f"row={row} is not in a layout of {layout.num_rows} row(s).")
    mask, kind = dense_mask(config, layout)[row], layout.kind[row]
    tokens = len(kind)
    cell = max(1, min(24, 960 // max(tokens, 1)))
    strip, left, top = max(10, cell), 24, 70
    side = tokens * cell
    legend = [
        k
        for k in (TokenKind.TEXT, TokenKind.VISION, TokenKind.VOCO, TokenKind.PAD)
        if bool((kind == k).any())
    ]
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    heading = title or caption(config)
    width = max(left + strip + side + 24, 460, int(font.getlength(heading)) + 2 * left)
    image = Image.new("RGB", (width, top + strip + side + 46), "white")
    draw = ImageDraw.Draw(image)
    draw.text((left, 12), heading, fill="black", font=font)
    x = left
    for entry in legend:
        draw.rectangle((x, 40, x + 12, 52), fill=COLOURS[entry])
        label = f"{NAMES[entry]} {int((kind == entry).sum())}"
        draw.text((x + 17, 39), label, fill="black", font=small)
        x += 34 + int(small.getlength(label))
    gap = 1 if cell >= 6 else 0
    for i in range(tokens):
        colour, at = COLOURS[int(kind[i])], i * cell
        draw.rectangle(
            (left + strip + at, top, left + strip + at + cell - 1 - gap, top + strip - 3), fill=colour
        )
        draw.rectangle(
            (left, top + strip + at, left + strip - 3, top + strip + at + cell - 1 - gap), fill=colour
        )
    for i, j in torch.ones_like(mask).nonzero().tolist() if gap else mask.nonzero().tolist():
        x0, y0 = left + strip + j * cell, top + strip + i * cell
        fill = COLOURS[int(kind[j])] if mask[i, j] else HIDDEN
        draw.rectangle((x0, y0, x0 + cell - 1 - gap, y0 + cell - 1 - gap), fill=fill)
    draw.rectangle(
        (left + strip - 1, top + strip - 1, left + strip + side, top + strip + side), outline=(160, 160, 160)
    )
    draw.text(
        (left, top + strip + side + 12),
        "rows: queries, columns: keys; filled: the query sees the key",
        "black",
        small,
    )
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)


def caption(config: VoCoConfig) -> str:
    """The rule in one line."""
    extra = ", hide_prefix" if config.hide_prefix else ""
    extra += "" if config.reads_vision else f", compressor={config.compressor}"
    extra += ", frozen_stage1 (compressed without the adapter)" if config.frozen_stage1 else ""
    if config.adapter_stages != "both":
        extra += f", adapter_stages={config.adapter_stages}"
    return f"rule={config.rule}, block_context={config.block_context}, positions={config.positions}{extra}"


def mask_text(config: VoCoConfig, layout: SequenceLayout, row: int = 0) -> str:
    """The mask of one row as text; a long row keeps only the ends of its runs, and ``~`` marks a cut."""
    if layout.num_tokens <= MAX_TEXT_TOKENS:
        return draw_mask(config, layout, row)
    mask, kind = dense_mask(config, layout)[row], layout.kind[row].tolist()
    block = layout.block[row].tolist()
    keep: list[int | None] = []
    start = 0
    for i in range(1, len(kind) + 1):
        if i == len(kind) or (kind[i], block[i]) != (kind[start], block[start]):
            run = list(range(start, i))
            keep += run if len(run) <= 5 else [*run[:2], None, *run[-2:]]
            start = i
    letters = ["~" if i is None else ".tvC"[kind[i]] for i in keep]
    lines = ["  " + " ".join(letters)]
    for letter, query in zip(letters, keep, strict=True):
        if query is None:
            lines.append("~")
            continue
        seen = ["~" if j is None else "x" if mask[query, j] else " " for j in keep]
        lines.append(" ".join([letter, *seen]).rstrip())
    return "\n".join(lines)
