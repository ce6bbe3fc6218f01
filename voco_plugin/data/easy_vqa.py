"""easy-VQA as published (Victor Zhou, 2019, MIT): coloured shapes of 64 pixels, questions answered in a word.

    easy_vqa/data/                    this folder, one that holds it as ``data``, or ``package:easy_vqa``
      train/  test/                   38,575 questions about 4,000 images; 9,673 about 1,000
        questions.json                [["what is the blue shape?", "rectangle", 0], …]: 0 is images/0.png
        images/0.png …
      answers.txt                     the 13 answers, one a line

``pip install easy-vqa`` carries it. Images are read where they are. The questions about one image become the
turns of one conversation, in their order; ``types`` are ``yes/no``, ``color`` and ``shape``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from voco_plugin.files import PACKAGE, package_folders

SPLITS = ("train", "test")


def easy_vqa_folder(name: str | Path) -> Path | None:
    """The folder of ``train`` and ``test`` that ``name`` stands for; ``None`` where it stands for a set of
    another kind. Opens no file.

    Raises:
        FileNotFoundError: a ``package:NAME`` is not installed.
        ValueError: it is installed and holds no set of this kind.
    """
    text = str(name)
    if text.startswith(PACKAGE):
        package = text.removeprefix(PACKAGE)
        folders = package_folders(package)
        if folders is None:
            raise FileNotFoundError(
                f"{text}: no package of that name is installed; install it (pip install easy-vqa gives "
                f"{PACKAGE}easy_vqa: the import name goes here)."
            )
        found = [place for folder in folders if (place := _inside(folder)) is not None]
        if not found:
            raise ValueError(
                f"{text}: the package {package} holds no set that is known here, which would be "
                f"easy-VQA's {SPLITS[0]}/questions.json and {SPLITS[0]}/images."
            )
        return found[0]
    return _inside(Path(text).expanduser())


def _inside(folder: Path) -> Path | None:
    for place in (folder, folder / "data"):
        if any((place / split / "questions.json").is_file() for split in SPLITS):
            return place
    return None


def read_easy_vqa(
    folder: Path, split: str | None = None, *, missing_images: bool = False
) -> tuple[list[dict[str, Any]], Path]:
    """One split as LLaVA's records, and the folder that their image names start from.

    Args:
        split: ``train`` or ``test``; ``None`` takes ``train``, or the only one.
        missing_images: whether images may be missing.

    Raises:
        ValueError: there is no such split, a question is not in the form above, or its image is missing; the
            message says which.
    """
    here = [name for name in SPLITS if (folder / name / "questions.json").is_file()]
    split = here[0] if split is None else split
    if split not in here:
        raise ValueError(f"{folder} has no split {split!r}: give one of {', '.join(here)}")
    path = folder / split / "questions.json"
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(asked, list) or not asked:
        raise ValueError(
            f"{path} holds no list of questions: easy-VQA's are [question, answer, image number]"
        )
    known = _answers(folder / "answers.txt")
    turns: dict[int, list[tuple[str, str]]] = {}
    for number, entry in enumerate(asked):
        question, answer, image = _checked(entry, f"{path}: question {number}")
        if known is not None and answer not in known:
            raise ValueError(
                f"{path}: question {number} has the answer {answer!r}, which is none of answers.txt "
                f"({', '.join(sorted(known))})"
            )
        turns.setdefault(image, []).append((question, answer))
    images = folder / split / "images"
    there = {file.name for file in images.iterdir()} if images.is_dir() else set()
    absent = [image for image in turns if f"{image}.png" not in there]
    if absent and not missing_images:
        raise ValueError(
            f"{path} asks about {len(absent)} images that are not in {images}, the first being "
            f"{absent[0]}.png: unpack the set whole"
        )
    return [_record(split, image, pairs) for image, pairs in turns.items()], images


def _answers(path: Path) -> set[str] | None:
    """The answers that there are; ``None`` where no file lists them."""
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else None


def _checked(entry: Any, where: str) -> tuple[str, str, int]:
    form = isinstance(entry, list) and len(entry) == 3
    if form and all(isinstance(text, str) and text.strip() for text in entry[:2]) and type(entry[2]) is int:
        return entry[0], entry[1], entry[2]
    raise ValueError(f"{where} is {str(entry)[:80]}: easy-VQA's are [question, answer, image number]")


def _record(split: str, image: int, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    said = []
    for number, (question, answer) in enumerate(pairs):
        said.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        said.append({"from": "gpt", "value": answer})
    kinds = [kind_of(question, answer) for question, answer in pairs]
    return {"id": f"{split}-{image}", "image": f"{image}.png", "conversations": said, "types": kinds}


def kind_of(question: str, answer: str) -> str:
    """``yes/no``, ``color`` or ``shape``."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "color" if "color" in question else "shape"
