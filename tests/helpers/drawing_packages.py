"""Small stand-ins for npm packages of drawings: a few named things as coloured shapes, and icons."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from PIL import Image, ImageDraw

from voco_plugin.gridworld.pictures.vocabulary import NAMES

KINDS = ("fruit", "dessert", "toy", "musical instrument")


def code_name(code: str) -> str:
    """A file's name as emoji-datasource has it."""
    return code.lower()


def drawing(text: str, label: str) -> Image.Image:
    """A shape whose colours hang on the name, and whose outline hangs on the vendor."""
    seed = zlib.crc32(text.encode())
    image = Image.new("RGBA", (64, 64))
    pen = ImageDraw.Draw(image)
    color = (seed % 256, seed // 256 % 256, seed // 65536 % 256, 255)
    box = (8 + seed % 5, 4, 60, 60 - seed % 7)
    (pen.ellipse if label == "one" else pen.rectangle)(box, fill=color, outline=(0, 0, 0, 255), width=3)
    pen.line((16, 16, 48, 20 + seed % 28), fill=(255, 255, 255, 255), width=5)
    return image


def write_package(
    folder: Path, label: str, names: list[str] | None = None, package: str | None = None
) -> Path:
    """An unpacked package of `label`, with every name of `KINDS`, or those given."""
    images = folder / "img" / label / "64"
    images.mkdir(parents=True)
    for name in NAMES:
        if name.text in names if names is not None else name.kind in KINDS:
            drawing(name.text, label).save(images / f"{code_name(name.code)}.png")
    about = {"name": package or f"emoji-datasource-{label}", "version": "16.0.0", "license": "MIT"}
    (folder / "package.json").write_text(json.dumps(about))
    return folder


INFO = {
    "name": "Fake Emoji",
    "author": {"name": "A. Drawer", "url": "https://example.org/drawer"},
    "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0"},
}


def icon(color: str, **shape: float) -> dict[str, object]:
    """An icon of 32 units: a bar across its middle."""
    return {"body": f'<path fill="{color}" d="M4 12h24v8H4z"/>', **shape}


def write_icons(folder: Path, icons: dict[str, object], info: dict | None = INFO, **more: object) -> Path:
    """An unpacked `@iconify-json/…` package of these icons; `more` goes into `icons.json`, `chars` apart."""
    folder.mkdir(parents=True)
    chars = more.pop("chars", {})
    whole = {"prefix": "fake", "icons": icons, "width": 32, "height": 32, **more}
    about = {"name": "@iconify-json/fake", "version": "1.2.0", "license": "CC-BY-4.0"}
    files = {"icons": whole, "chars": chars, "package": about} | ({"info": info} if info else {})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_packages(root: Path) -> tuple[list[str], str]:
    """Three vendors' packages below `root`, as `--draw` and `--unseen` take them."""
    options = [f"{label}={write_package(root / label, label)}" for label in ("one", "two", "three")]
    return options[:2], options[2]
