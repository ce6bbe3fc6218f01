"""Image files of every odd and every bad kind, and the rows and collators they are tried in."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, List
from PIL import Image as PILImage

import voco_plugin as vp
from tiny import processors
from voco_plugin.training.collator import VoCoDataCollator

RED, SIZE = (200, 30, 40), (24, 16)


def two_halves(mode: str = "RGB") -> PILImage.Image:
    """Left half red, right half black."""
    image = PILImage.new("RGB", SIZE, RED)
    image.paste((0, 0, 0), (12, 0, 24, 16))
    return image if mode == "RGB" else image.convert(mode)


def write_odd(folder: Path) -> dict[str, tuple[Path, tuple[int, int], dict]]:
    """Good but odd files: name → (path, size as RGB, pixels that are known, within 3)."""
    made = {}

    def add(name: str, image: PILImage.Image, size: tuple, pixels: dict, **save) -> None:
        path = folder / name
        image.save(path, **save)
        made[name] = (path, size, pixels)

    halves = {(2, 2): RED, (20, 2): (0, 0, 0)}
    add("tiny.png", PILImage.new("RGB", (1, 1), RED), (1, 1), {(0, 0): RED})
    add("cmyk.tif", two_halves("CMYK"), SIZE, halves)
    ramp = np.zeros((16, 24), dtype=np.uint16)
    ramp[:, 8:16], ramp[:, 16:] = 32896, 65535
    grey = {(2, 2): (0, 0, 0), (10, 2): (128, 128, 128), (20, 2): (255, 255, 255)}
    add("grey16.png", PILImage.fromarray(ramp), SIZE, grey)
    add("grey16.tif", PILImage.fromarray(ramp), SIZE, grey)
    dark = PILImage.fromarray((ramp // 257).astype(np.int32))
    add("int32.tif", dark, SIZE, grey)
    frames = [two_halves(), PILImage.new("RGB", SIZE, (0, 0, 255))]
    add("moving.gif", frames[0], SIZE, halves, save_all=True, append_images=frames[1:], duration=40)
    add("moving.png", frames[0], SIZE, halves, save_all=True, append_images=frames[1:], duration=40)
    add("moving.webp", frames[0], SIZE, halves, save_all=True, append_images=frames[1:], lossless=True)
    add("palette.png", two_halves().quantize(4), SIZE, halves)
    clear = two_halves().quantize(4)
    ink = clear.getpixel((20, 2))  # the black half is the transparent colour: white shows through
    add("clear.png", clear, SIZE, {(2, 2): RED, (20, 2): (255, 255, 255)}, transparency=ink)
    alpha = two_halves("RGBA")
    alpha.putalpha(PILImage.linear_gradient("L").resize(SIZE).point(lambda v: 255 if v > 127 else 128))
    half = tuple((c * 128 + 255 * 127) // 255 for c in RED)
    add("alpha.png", alpha, SIZE, {(2, 14): RED, (2, 1): half})
    add("bit.png", PILImage.new("1", SIZE, 1), SIZE, {(3, 3): (255, 255, 255)})
    exif = PILImage.Exif()
    exif[0x0112] = 6  # taken with the camera on its side: the left half belongs on top
    add("turned.png", two_halves(), (16, 24), {(2, 2): RED, (2, 20): (0, 0, 0)}, exif=exif)
    return made


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x\x9c\x03\x00") + chunk(b"IEND", b"")
    )


def write_bad(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that no image can be had from: name → (path, a piece of the reason)."""
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = {kind: io.BytesIO() for kind in ("PNG", "JPEG")}
    for kind, stream in whole.items():
        noise.save(stream, kind)
    png, jpeg = (stream.getvalue() for stream in whole.values())
    limit = PILImage.MAX_IMAGE_PIXELS
    side = int((1.5 * limit) ** 0.5)  # Pillow only warns here
    bodies = {
        "empty.png": (b"", "the file is empty"),
        "text.jpg": (b"this is no image", "no image that Pillow knows"),
        "short.png": (png[: len(png) // 2], "truncated|broken|unrecognized"),
        "short.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "flipped.png": (png[:60] + bytes(200) + png[260:], "."),
        "large.png": (png_of(side, side), f"more than {limit} pixels.*MAX_IMAGE_PIXELS"),
        "bomb.png": (png_of(60000, 60000), "exceeds limit|more than"),
    }
    made = {}
    for name, (body, why) in bodies.items():
        (folder / name).write_bytes(body)
        made[name] = (folder / name, why)
    made["missing.png"] = (folder / "missing.png", "does not exist")
    PILImage.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(folder / "float.tif")
    made["float.tif"] = (folder / "float.tif", "floating point")
    return made


ODD = (
    *("tiny.png", "cmyk.tif", "grey16.png", "grey16.tif", "int32.tif", "moving.gif", "moving.png"),
    *("moving.webp", "palette.png", "clear.png", "alpha.png", "bit.png", "turned.png"),
)
BAD = (
    *("empty.png", "text.jpg", "short.png", "short.jpg", "flipped.png", "large.png", "bomb.png"),
    *("missing.png", "float.tif"),
)


def talk(answer: str = "red") -> list[dict]:
    image, ask = {"type": "image", "text": None}, {"type": "text", "text": "what is it"}
    said = [{"type": "text", "text": answer}]
    return [{"role": "user", "content": [image, ask]}, {"role": "assistant", "content": said}]


def rows_of(paths, with_id: bool = True, embed: bool = False) -> Dataset:
    images = [
        [{"bytes": Path(p).read_bytes(), "path": None} if embed else {"bytes": None, "path": str(p)}]
        for p in paths
    ]
    columns = {"messages": [talk() for _ in paths], "images": images}
    if with_id:
        columns["id"] = [f"row-{i}" for i in range(len(paths))]
    return Dataset.from_dict(columns).cast_column("images", List(Image()))


def collator(name: str = "llava_llama", **options) -> VoCoDataCollator:
    processor = processors.processor(name)
    processor.tokenizer.add_tokens(["<voco>"], special_tokens=True)
    return VoCoDataCollator(processor=processor, **{"voco": vp.VoCoConfig(num_tokens=2), **options})
