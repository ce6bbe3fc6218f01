"""How a set of images with questions is written: LLaVA JSON, a `datasets` folder, and the folder of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
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
        DatasetDict({s: Dataset.from_dict(c, features=features) for s, c in columns.items()}).save_to_disk(
            folder
        )
    finally:
        if quiet:
            enable_progress_bar()


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
