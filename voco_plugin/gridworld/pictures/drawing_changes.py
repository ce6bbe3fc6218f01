"""How a drawing is changed before a tower trains on it, since another vendor draws the thing otherwise.

    form     mirrored, turned, stretched, sheared, a part of it hidden
    style    flat colours, a dark outline, dark lines where colours meet, lines alone
    colour   another hue, paler or stronger, lighter or darker, grey

Each change comes with a chance of its own, so that one drawing in several stays nearly as it is.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

_MARGIN = 3  # pixels that an outline may take around the drawing


def changed(drawing: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A drawing, RGBA, changed at random and `size` pixels a side."""
    drawing = _styled(_formed(drawing, size, rng), rng)
    alpha = drawing.getchannel("A")
    color = _recolored(drawing.convert("RGB"), rng)
    if int(rng.integers(4)) == 0:
        alpha = _part_hidden(alpha, rng)
    color.putalpha(alpha)
    return color


def _formed(drawing: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    if int(rng.integers(2)):
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if int(rng.integers(2)):
        drawing = drawing.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR, expand=True)
    if int(rng.integers(3)) == 0:
        across, down = (float(v) for v in rng.uniform(-0.2, 0.2, 2))
        half = drawing.width / 2
        drawing = drawing.transform(
            drawing.size,
            Image.Transform.AFFINE,
            (1, across, -across * half, down, 1, -down * half),
            Image.Resampling.BILINEAR,
        )
    inner = size - 2 * _MARGIN
    width, height = inner, inner
    if int(rng.integers(2)):
        shorter = int(inner * rng.uniform(0.7, 1.0))
        width, height = (shorter, inner) if int(rng.integers(2)) else (inner, shorter)
    small = drawing.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    whole = Image.new("RGBA", (size, size))
    whole.paste(small, ((size - width) // 2, (size - height) // 2))
    return whole


def _styled(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Flat colours and dark lines, in place of shades and soft edges."""
    alpha, color = drawing.getchannel("A"), drawing.convert("RGB")
    lines = None
    if int(rng.integers(2)):
        lines = _inner_lines(color, alpha, rng)
    if int(rng.integers(3)) == 0:
        color = color.filter(ImageFilter.MedianFilter(3))
        color = ImageOps.posterize(color, int(rng.integers(1, 4)))
    alone = lines is not None and int(rng.integers(5)) == 0
    if alone:
        level = int(rng.integers(3))
        fill = (255, 255, 255) if level else tuple(int(v) for v in rng.integers(0, 256, 3))
        color = Image.new("RGB", color.size, fill)
    ink = tuple(int(v) for v in rng.integers(0, 50, 3))
    if lines is not None:
        color.paste(ink, mask=lines)
    if alone or int(rng.integers(2)):
        around = alpha.filter(ImageFilter.MaxFilter(3 if int(rng.integers(2)) else 5))
        edge = ImageChops.subtract(around, alpha.filter(ImageFilter.MinFilter(3)))
        color.paste(ink, mask=edge)
        alpha = around
    color.putalpha(alpha)
    return color


def _inner_lines(color: Image.Image, alpha: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Where colours meet inside the drawing, as a mask."""
    found = np.asarray(color, np.int16)
    steps = np.zeros(found.shape[:2], np.int16)
    steps[:, :-1] = np.abs(found[:, 1:] - found[:, :-1]).max(-1)
    steps[:-1] = np.maximum(steps[:-1], np.abs(found[1:] - found[:-1]).max(-1))
    strength = np.clip((steps - int(rng.integers(20, 60))) * 6, 0, 255).astype(np.uint8)
    mask = Image.fromarray(strength)
    if int(rng.integers(2)):
        mask = mask.filter(ImageFilter.MaxFilter(3))
    return ImageChops.multiply(mask, alpha)


def _recolored(color: Image.Image, rng: np.random.Generator) -> Image.Image:
    if int(rng.integers(2)):
        hue, saturation, value = color.convert("HSV").split()
        turn = int(rng.integers(-40, 41)) if int(rng.integers(4)) else int(rng.integers(256))
        hue = hue.point([(level + turn) % 256 for level in range(256)])
        color = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if int(rng.integers(2)):
        color = ImageEnhance.Color(color).enhance(float(rng.uniform(0.0, 1.8)))
        color = ImageEnhance.Brightness(color).enhance(float(rng.uniform(0.6, 1.4)))
        color = ImageEnhance.Contrast(color).enhance(float(rng.uniform(0.6, 1.6)))
    if int(rng.integers(10)) == 0:
        color = color.convert("L").convert("RGB")
    return color


def _part_hidden(alpha: Image.Image, rng: np.random.Generator) -> Image.Image:
    """With a rectangle cut out, a third of each side at most."""
    side = alpha.width
    width, height = (int(v) for v in rng.integers(side // 8, side // 3 + 1, 2))
    left, top = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
    alpha = alpha.copy()
    alpha.paste(0, (left, top, left + width, top + height))
    return alpha
