"""Writes the set of named pictures: scenes of drawings by real vendors, questions with exact answers.

    out_dir/
      train.json           LLaVA format, each row a conversation of several questions and a caption
      test.json            new scenes of the same names and vendors
      test_drawings.json   the same names as another vendor draws them
      test_names.json      names that no training scene shows: what kind they are, how many there are
      images/SPLIT/000000.png  the images that "image" names, relative to images/
      hf/                  the four as a `datasets` folder, in TRL's vision format
      scenes.json          what each image holds, place by place
      meta.json            settings, sources, names, and the accuracy of the best guesser who sees no image
      ATTRIBUTION.md       whose drawings the images show, and under which licence

One seed gives the same scenes, questions and pixels. Image `i` of a split does not depend on how many are
written. `types` (one label per question) stands next to the conversation, as in the gridworld's files.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voco_plugin.gridworld.pictures.drawings import Vendor, open_vendor
from voco_plugin.gridworld.pictures.picture_questions import (
    NAMELESS,
    PICTURE_TYPES,
    World,
    ask,
    describe,
    guesser,
)
from voco_plugin.gridworld.pictures.picture_scenes import SIDE, PictureScene, paint, sample_scene
from voco_plugin.gridworld.pictures.vocabulary import NAMES, Name, held_out
from voco_plugin.gridworld.questions import Turn
from voco_plugin.gridworld.row_files import MARKER, prepare_folder, save_hf, write_json, write_split

FORMAT = "pictures"
FORMAT_VERSION = 2
SPLITS: tuple[str, ...] = ("train", "test", "test_drawings", "test_names")
ATTRIBUTION = "ATTRIBUTION.md"


@dataclass(frozen=True)
class Sources:
    """Whose drawings of which names there are.

    Attributes:
        drawn: the vendors of training, by label.
        unseen: the vendor that only `test_drawings` shows, by label.
        names: those that one of the vendors of training draws at least.
        missing: those that none of these does.
    """

    drawn: Mapping[str, Vendor]
    unseen: Mapping[str, Vendor]
    names: tuple[Name, ...]
    missing: tuple[str, ...]

    @property
    def vendors(self) -> dict[str, Vendor]:
        return {**self.drawn, **self.unseen}

    def counted(self) -> str:
        """How many of the names each vendor draws, as one line."""
        first, *others = self.vendors.items()
        said = [f"{first[0]} draws {first[1].drawn()}", *(f"{label} {v.drawn()}" for label, v in others)]
        return f"of {len(NAMES)} names, {', '.join(said)}"

    def known(self) -> tuple[Name, ...]:
        """The names that training shows."""
        out = held_out(self.names)
        return tuple(name for name in self.names if name.text not in out)

    def unknown(self) -> tuple[Name, ...]:
        """The names held out from it."""
        out = held_out(self.names)
        return tuple(name for name in self.names if name.text in out)

    def of_split(self, split: str) -> tuple[tuple[Name, ...], dict[str, tuple[str, ...]], tuple[str, ...]]:
        """Names, each name's vendors by label, and question types of a split."""
        vendors = self.unseen if split == "test_drawings" else self.drawn
        draw = {
            name.text: tuple(label for label, vendor in vendors.items() if vendor.has(name))
            for name in (self.unknown() if split == "test_names" else self.known())
        }
        names = tuple(name for name in self.names if draw.get(name.text))
        return names, draw, NAMELESS if split == "test_names" else tuple(PICTURE_TYPES)


def open_sources(draw: Sequence[str], unseen: str) -> Sources:
    """The packages of drawings.

    Args:
        draw: `LABEL=FOLDER` per vendor of training.
        unseen: `LABEL=FOLDER` of the vendor held out.

    Raises:
        ValueError: a label comes twice, a folder holds no drawings, or the vendors draw too few names.
        FileNotFoundError: there is no such folder.
    """
    if not draw:
        raise ValueError("draw names no vendor: give at least one LABEL=FOLDER")
    drawn: dict[str, Vendor] = {}
    for option in [*draw, unseen]:
        vendor = open_vendor(option)
        if vendor.label in drawn:
            raise ValueError(
                f"{vendor.label} is given twice: each vendor once, the unseen one not among draw"
            )
        drawn[vendor.label] = vendor
    held = {vendor.label: drawn.pop(vendor.label)}
    names = tuple(name for name in NAMES if any(vendor.has(name) for vendor in drawn.values()))
    missing = tuple(name.text for name in NAMES if name not in names)
    sources = Sources(drawn, held, names, missing)
    for split, vendors in (("train", drawn), ("test_drawings", held), ("test_names", drawn)):
        shown = sources.of_split(split)[0]
        if not shown or (split != "test_names" and len({name.kind for name in shown}) < 2):
            says = "draws" if len(vendors) == 1 else "draw"
            raise ValueError(
                f"{', '.join(vendors)} {says} {len(shown)} of the names that {split} shows, too few for a "
                "set: are these the whole packages?"
            )
    return sources


def write_pictures(
    out_dir: str | Path,
    sources: Sources,
    num_train: int = 12_000,
    num_test: int = 300,
    seed: int = 0,
    *,
    num_questions: int = 7,
    caption: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the set into `out_dir` and return what `meta.json` holds.

    Args:
        out_dir: folder to make.
        sources: whose drawings (`open_sources`).
        num_train: training images.
        num_test: images of each test split.
        seed: the same seed, settings and packages give the same scenes and questions.
        num_questions: questions per image, each a turn of its conversation.
        caption: end each training conversation with "Describe the picture."
        overwrite: replace an earlier set in `out_dir`.

    Raises:
        ValueError: a setting is out of range, or `out_dir` holds something else, or holds a set and not
        `overwrite`.
    """
    limits = {"num_train": (1, 10**6), "num_test": (1, 10**6), "num_questions": (1, 20)}
    for key, value in {"num_train": num_train, "num_test": num_test, "num_questions": num_questions}.items():
        low, high = limits[key]
        if not low <= value <= high:
            raise ValueError(f"{key}={value} is out of range: give {low} to {high}")
    out = Path(out_dir)
    files = (*(f"{split}.json" for split in SPLITS), "scenes.json", ATTRIBUTION)
    prepare_folder(out, overwrite, FORMAT, files, ("images", "hf"))
    scenes: dict[str, Any] = {}
    turns: dict[str, list[Turn]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        number = num_train if split == "train" else num_test
        items = make_items(split, range(number), seed, sources, num_questions)
        told = describe if caption and split == "train" else None
        found, rows[split], turns[split] = write_split(out, split, items, told)
        scenes |= found
    write_json(out / "scenes.json", scenes)
    (out / ATTRIBUTION).write_text(attribution(sources), encoding="utf-8")
    save_hf(out / "hf", rows)
    meta = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "settings": {
            "num_train": num_train, "num_test": num_test, "seed": seed, "num_questions": num_questions,
            "caption": caption, "side": SIDE,
        },
        "drawn": {label: vendor.record() for label, vendor in sources.drawn.items()},
        "unseen": {label: vendor.record() for label, vendor in sources.unseen.items()},
        "names": [name.text for name in sources.known()],
        "held_out_names": [name.text for name in sources.unknown()],
        "missing_names": list(sources.missing),
        "blind_accuracy": {split: guesser(turns["train"], turns[split]) for split in SPLITS[1:]},
    }  # fmt: skip
    write_json(out / MARKER, meta, indent=2)
    return meta


def make_items(
    split: str, indices: Sequence[int], seed: int, sources: Sources, num_questions: int
) -> Iterator[tuple[PictureScene, list[Turn], bytes]]:
    """Items of a split: the scene, its questions, and the image as PNG bytes."""
    names, draw, types = sources.of_split(split)
    world = World(names)
    by_text = {name.text: name for name in sources.names}
    for index in indices:
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        # only these two show the same names by the same vendors
        scene = sample_scene(rng, names, draw, split if split in ("train", "test") else None)
        asked = ask(scene, rng, num_questions, world, types)
        buffer = io.BytesIO()
        paint(scene, sources.vendors, by_text).save(buffer, format="PNG")
        yield scene, asked, buffer.getvalue()


def attribution(sources: Sources) -> str:
    """Whose drawings the images show, as Markdown."""
    lines = [
        "# Attribution", "",
        "The images of this folder are composed of drawings out of these packages. Each was cut to what is "
        "visible, scaled and put on a background; nothing else was changed.", "",
        "| vendor | package | artwork and licence | shown in |", "|---|---|---|---|",
    ]  # fmt: skip
    for label, vendor in sources.vendors.items():
        where = "`test_drawings`" if label in sources.unseen else "`train`, `test`, `test_names`"
        lines.append(f"| {label} | {vendor.package} {vendor.version} | {vendor.licence} | {where} |")
    lines += [
        "", "Whoever passes these images on owes these vendors what their licences ask for: the names above, "
        "and, for artwork under CC-BY-SA, the same licence.", "",
    ]  # fmt: skip
    return "\n".join(lines)
