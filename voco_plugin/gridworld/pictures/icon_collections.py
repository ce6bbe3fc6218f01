"""Drawings out of an unpacked `@iconify-json/…` package: one JSON file of SVG bodies.

    icons.json   {"icons": {"dog-face": {"body": "<path …/>"}}, "aliases": {"bear": {"parent": "bear-face"}},
                  "width": 64, "height": 64}
    chars.json   {"1f436": "dog-face"}; empty in most packages
    info.json    name, author and licence of the artwork

An icon is looked up by the character in `chars.json`, then by the character's name in Unicode ("DOG FACE"),
then by the other names that collections give it (`_ALSO_CALLED`): Unicode's short names, and the older
collections' own. Case, hyphens and a number at the end ("doughnut-1", the first of several) do not matter.
"""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from voco_plugin.gridworld.pictures.vocabulary import NAMES, Name

_FILE = "icons.json"
_SHAPE = ("left", "top", "width", "height")
# an alias with one of these shows its parent otherwise
_TURNS = ("rotate", "hFlip", "vFlip")

# text → what else collections call it: Unicode's short names, then spellings of single collections
_ALSO_CALLED = {
    "dog": "dog", "cat": "cat", "wolf": "wolf", "fox": "fox", "lion": "lion", "tiger": "tiger",
    "moose": "moose", "donkey": "donkey", "unicorn": "unicorn", "zebra": "zebra", "pig": "pig",
    "mouse": "mouse", "sheep": "ewe", "camel": "camel", "giraffe": "giraffe", "hamster": "hamster, hampster",
    "rabbit": "bunny", "bear": "bear", "panda": "panda", "dove": "dove", "goose": "goose", "frog": "frog",
    "whale": "whale", "jellyfish": "jellyfish", "pine tree": "evergreen", "hyacinth": "hyacinth",
    "rice plant": "sheaf of rice", "lime": "lime", "eggplant": "eggplant", "corn": "ear of corn",
    "chili pepper": "chili pepper", "ginger": "ginger root", "peas": "pea pod", "pizza": "pizza",
    "curry": "curry rice", "salt shaker": "salt", "mate": "mate", "wine": "red wine glass",
    "steam engine": "locomotive", "bullet train": "bullet train", "motorcycle": "motorcycle",
    "kick scooter": "kick scooter", "house": "house", "castle": "castle", "tower": "toykotower",
    "sun": "sun", "star": "star", "tornado": "tornado", "lightning": "high voltage",
    "snowy mountain": "snowmountains", "basketball": "basketball", "cricket bat": "cricket game",
    "field hockey stick": "field hockey", "ice hockey stick": "ice hockey", "lacrosse stick": "lacrosse",
    "table tennis bat": "ping pong", "badminton racket": "badminton", "fishing rod": "fishing pole",
    "running shirt": "running shirt", "skis": "skis", "dartboard": "bullseye",
    "billiard ball": "pool 8 ball", "drum": "drum", "maracas": "maracas", "flute": "flute", "clamp": "clamp",
    "scales": "balance scale", "flashlight": "flashlight",
    "magnifying glass": "magnifying glass tilted left, leftmagnifyingglass", "soap": "soap",
    "shopping cart": "shopping cart", "light bulb": "light bulb", "padlock": "locked", "yarn": "yarn",
    "kitchen knife": "kitchen knife", "glasses": "glasses", "sunglasses": "sunglasses",
    "backpack": "backpack, school backpack", "necktie": "tie", "sneaker": "running shoe",
    "high heel": "heels", "laptop": "laptop, laptop computer", "compact disc": "optical disk",
    "telephone": "telephone", "mobile phone": "cellphone", "videotape": "videocasette",
    "scissors": "scissors", "pen": "pen, lowerleftpen", "crayon": "crayon", "paintbrush": "paintbrush",
    "gift": "wrapped gift, present", "pinata": "piñata, pinata", "puzzle piece": "puzzle piece",
}  # fmt: skip

# a collection's prefix → names whose character's name it gives to another thing: the country, the game, the
# musical one, one of a desktop
_OTHER_THINGS = {
    "streamline-emojis": {"turkey"},
    "emojione": {"grasshopper"},
    "noto-v1": {"grasshopper"},
    "fxemoji": {"keyboard", "window"},
}


def is_collection(folder: Path) -> bool:
    return (folder / _FILE).is_file()


def read_collection(folder: Path) -> tuple[dict[str, str], str | None]:
    """The SVG files of the vocabulary's names, and what the package says of its artwork.

    Returns:
        A name's characters as in the vocabulary → SVG text; and name, author and licence of the artwork, or
        None where `info.json` names no licence.

    Raises:
        ValueError: `icons.json` holds no collection, or an icon in it no drawing.
    """
    whole = _read(folder / _FILE)
    icons = whole.get("icons")
    if not isinstance(icons, dict):
        raise ValueError(f'{folder / _FILE} is no collection of icons: it has no "icons"')
    aliases = whole.get("aliases") or {}
    chars = _read(folder / "chars.json") if (folder / "chars.json").is_file() else {}
    named: dict[str, str] = {}
    for key in sorted([*aliases, *icons], key=lambda key: (key not in icons, key)):
        named.setdefault(_letters(key), key)
        named.setdefault(_letters(re.sub(r"-\d$", "", key)), key)
    svgs = {}
    others = _OTHER_THINGS.get(str(whole.get("prefix")), set())
    for name in NAMES:
        if name.text in others:
            continue
        for called in _called(name, chars):
            icon = _resolved(named.get(_letters(called), ""), icons, aliases)
            if icon is not None:
                if not isinstance(icon.get("body"), str):
                    raise ValueError(f"{folder / _FILE}: the icon of {name.text} has no body")
                svgs[name.code] = _svg(icon, whole)
                break
    return svgs, _artwork(folder / "info.json")


def _called(name: Name, chars: dict[str, Any]) -> list[str]:
    """What a collection may call it, the surest first."""
    plain = [part for part in name.code.split("-") if part != "FE0F"]
    keys = (name.code.lower(), "-".join(plain).lower())
    found = [str(chars[key]) for key in keys if key in chars]
    if len(plain) == 1:
        found.append(unicodedata.name(chr(int(plain[0], 16)), ""))
    return [called for called in [*found, *_ALSO_CALLED.get(name.text, "").split(", ")] if called]


def _letters(called: str) -> str:
    return re.sub(r"[^\w]|_", "", called.lower())


def _resolved(key: str, icons: dict[str, Any], aliases: dict[str, Any]) -> dict[str, Any] | None:
    """The icon of that name, or the one that its alias stands for; None where there is none as it is."""
    changes: dict[str, Any] = {}
    for _ in range(8):  # an alias of an alias; a circle ends
        if key in icons:
            return {**icons[key], **changes}
        alias = aliases.get(key)
        if not isinstance(alias, dict) or any(alias.get(turn) for turn in _TURNS):
            return None
        changes = {**{side: alias[side] for side in _SHAPE if side in alias}, **changes}
        key = str(alias.get("parent", ""))
    return None


def _svg(icon: dict[str, Any], whole: dict[str, Any]) -> str:
    left, top, width, height = (
        icon.get(side, whole.get(side, default)) for side, default in zip(_SHAPE, (0, 0, 16, 16), strict=True)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _artwork(file: Path) -> str | None:
    about = _read(file) if file.is_file() else {}
    licence, author = about.get("license") or {}, about.get("author") or {}
    said = licence.get("title") or licence.get("spdx")
    if not said:
        return None
    by = " ".join(part for part in (author.get("name"), author.get("url")) if part)
    return ", ".join(part for part in (about.get("name"), by, said) if part)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (ValueError, AssertionError) as problem:
        raise ValueError(f"{file} holds no JSON object") from problem
    return found
