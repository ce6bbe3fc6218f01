"""How a set of images with questions is written: LLaVA JSON, a `datasets` folder, and the folder of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from voco_plugin.data.conversations import PLACEHOLDER

MARKER = "meta.json"
"""The file that says what a folder holds."""


def prepare_folder(
    out: Path, overwrite: bool, what: str, files: Sequence[str], folders: Sequence[str]
) -> None:
    """Makes `out`, or empties it of an earlier set of the same format; nothing else is ever removed.

    Args:
        out: folder to make.
        overwrite: replace an earlier set.
        what: the `format` that its `meta.json` names.
        files, folders: what a set consists of, besides `meta.json`.

    Raises:
        ValueError: `out` holds something else, or a set and not `overwrite`.
    """
    if out.is_dir() and any(out.iterdir()):
        marker = out / MARKER
        if not marker.is_file() or json.loads(marker.read_text()).get("format") != what:
            raise ValueError(f"{out} is not empty and holds no {what}: give another folder")
        if not overwrite:
            raise ValueError(f"{out} holds a {what} already: pass overwrite=True, or give another folder")
        for name in folders:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (*files, MARKER):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def write_split(
    out: Path, split: str, items: Iterable[tuple[Any, list[Any], bytes]], caption: Callable[[Any], Any] | None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Any]]:
    """Writes the images of one split, as they come, and its LLaVA JSON.

    Args:
        items: scene (with `as_json()`), its turns, and its picture as PNG.
        caption: the turn that ends each conversation; `None`: none.

    Returns:
        row id → scene as JSON, the rows, and their turns without captions.
    """
    (out / "images" / split).mkdir(parents=True)
    scenes: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    turns: list[Any] = []
    for index, (scene, asked, png) in enumerate(items):
        turns += asked
        told = asked if caption is None else [*asked, caption(scene)]
        row_id, name = f"{split}-{index:06d}", f"{split}/{index:06d}.png"
        (out / "images" / name).write_bytes(png)
        scenes[row_id] = scene.as_json()
        rows.append({"id": row_id, "image": name, "turns": told, "png": png})
    write_json(out / f"{split}.json", [llava_row(row) for row in rows])
    return scenes, rows, turns


def llava_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row, `{"id", "image", "turns", "png"}`, as LLaVA's JSON has it."""
    conversations = []
    for number, turn in enumerate(row["turns"]):
        before = "" if number else f"{PLACEHOLDER}\n"
        conversations.append({"from": "human", "value": before + turn.question})
        conversations.append({"from": "gpt", "value": turn.answer})
    types = [turn.type for turn in row["turns"]]
    return {"id": row["id"], "image": row["image"], "conversations": conversations, "types": types}


def trl_row(row: dict[str, Any]) -> dict[str, Any]:
    """The same row in TRL's vision format."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(row["turns"]):
        content = [] if number else [{"type": "image", "text": None}]
        content.append({"type": "text", "text": turn.question})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    image = {"bytes": row["png"], "path": row["image"].rsplit("/", 1)[-1]}
    return {
        "id": row["id"],
        "messages": messages,
        "images": [image],
        "types": [turn.type for turn in row["turns"]],
    }


def save_hf(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Rows per split as a `datasets` folder."""
    from datasets import Dataset, DatasetDict
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    from voco_plugin.data.llava_format import vision_features

    features = vision_features(with_id=True, with_types=True)
    columns = {
        split: {name: [trl_row(row)[name] for row in rows[split]] for name in features} for split in rows
    }
    quiet = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        made = {s: Dataset.from_dict(c, features=features) for s, c in columns.items()}
        DatasetDict(made).save_to_disk(str(folder))  # fsspec of 2024.3 takes no path objects
    finally:
        if quiet:
            enable_progress_bar()


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
