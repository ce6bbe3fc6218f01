"""A contact sheet: images with the questions asked of them, the answers given and whether they are right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ...files import atomic_path

RIGHT, WRONG, INK = (22, 120, 50), (190, 30, 30), (30, 30, 30)


@dataclass
class SheetEntry:
    """One image and its ``(question, answer, expected)`` rows; ``expected`` may be ``None`` (not known)."""

    image: Image.Image
    rows: Sequence[tuple[str, str, str | None]] = field(default_factory=list)
    title: str = ""


def draw_sheet(
    entries: Sequence[SheetEntry], path: str | Path, *, columns: int = 3, side: int = 176, title: str = ""
) -> Path:
    """Write the sheet to ``path`` (PNG). Images are ``side`` pixels wide; a wrong answer is red, and says
    what is right.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not entries:
        raise ValueError("no images to draw a contact sheet of.")
    font, bold = ImageFont.load_default(12), ImageFont.load_default(14)
    width, line, pad = side + 250, 15, 14
    wrapped = [[_lines(*row) for row in entry.rows] for entry in entries]
    text_height = max(sum(len(lines) * line + 5 for lines in cell) for cell in wrapped)
    height = max(side, text_height) + 2 * pad + 18
    columns = min(columns, len(entries))
    rows = -(-len(entries) // columns)
    top = 40 if title else 8
    sheet = Image.new("RGB", (columns * width + pad, top + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((pad, 12), title, fill=INK, font=ImageFont.load_default(16))
    for number, (entry, cell) in enumerate(zip(entries, wrapped, strict=True)):
        x, y = pad + (number % columns) * width, top + (number // columns) * height
        draw.text((x, y), entry.title, fill=INK, font=bold)
        picture = entry.image.convert("RGB")
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        sheet.paste(
            picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS),
            (x, y + 20),
        )
        at = y + 20
        for lines in cell:
            for text, colour in lines:
                draw.text((x + side + 12, at), text, fill=colour, font=font)
                at += line
            at += 5
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(path)


def _lines(question: str, answer: str, expected: str | None) -> list[tuple[str, tuple[int, int, int]]]:
    good = expected is None or answer.strip().lower() == expected.strip().lower()
    told = answer if good else f"{answer or '(nothing)'}   (right: {expected})"
    colour = INK if expected is None else RIGHT if good else WRONG
    wrap = textwrap.wrap
    return [(text, INK) for text in wrap(question, 36)] + [
        (f"  {text}", colour) for text in wrap(told, 34) or ["-"]
    ]
