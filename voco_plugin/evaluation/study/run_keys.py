"""Keys: hashes of everything that determines a run, so that it is computed once and no change goes unnoticed.

A training's key covers the recipe's values with every override, except those that only say where files go
and what is logged, and the content of every file or folder that they name: base model, data, plugins,
teachers. Paths are not part of it (a moved folder keeps its key), and neither are versions and machine, which
each result records.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...config import VoCoConfig
from ...files import PACKAGE, package_folders

IGNORED = (
    "output_dir", "run_name", "report_to", "disable_tqdm", "log_level", "logging_dir", "logging_steps",
    "logging_strategy", "logging_first_step", "save_strategy", "save_steps", "save_total_limit",
    "save_only_model", "resume_from_checkpoint", "dataloader_num_workers", "dataloader_pin_memory",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo",
)  # fmt: skip
"""Keys of a recipe that change nothing about what is learned."""
_WHOLE, _PIECE, _PIECES = 64 << 20, 1 << 20, 32
_IMAGES = 32
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Fingerprint = Callable[[str], str]


def digest(value: Any) -> str:
    """Sixteen hex digits of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hash_file(sha: Any, path: Path) -> None:
    """All of a file; of more than 64 MiB its size and 32 pieces of 1 MiB."""
    size = path.stat().st_size
    sha.update(f"{size}|".encode())
    with path.open("rb") as stream:
        if size <= _WHOLE:
            while piece := stream.read(_PIECE):
                sha.update(piece)
            return
        for number in range(_PIECES):
            stream.seek(number * (size - _PIECE) // (_PIECES - 1))
            sha.update(stream.read(_PIECE))


@functools.lru_cache(maxsize=256)
def fingerprint(source: str) -> str:
    """Of what ``source`` names: the content of a file, a folder or an installed package (``package:NAME``),
    or the name itself where it is none of these.

    A folder's pictures count by name and size, checkpoints of a training in it and hidden files not at all.
    """
    if source.startswith(PACKAGE):
        folders = package_folders(source.removeprefix(PACKAGE))
        return digest([fingerprint(str(folder)) for folder in folders]) if folders else f"name:{source}"
    path = Path(source).expanduser()
    sha = hashlib.sha256()
    if path.is_file():
        _hash_file(sha, path)
        _hash_pictures(sha, path)
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            hidden = any(
                part.startswith((".", "checkpoint-", "_sav", "__pycache__")) for part in inside.parts
            )
            if hidden or not file.is_file() or file.name in ("README.md", "train_results.json"):
                continue
            sha.update(f"|{inside.as_posix()}|".encode())
            if file.suffix.lower() in _PICTURES:
                sha.update(str(file.stat().st_size).encode())
            else:
                _hash_file(sha, file)
    else:
        return f"name:{source}"
    return sha.hexdigest()[:16]


def _hash_pictures(sha: Any, path: Path) -> None:
    """A few of the pictures that belong to a LLaVA file: the same questions may be about other images."""
    if path.suffix.lower() != ".json" or path.stat().st_size > _WHOLE:
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return
    rows = [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    named = [r["image"] for r in rows if isinstance(r.get("image"), str)]
    for name in named[:: max(1, len(named) // _IMAGES)]:
        for folder in (path.parent / "images", path.parent):
            if (folder / name).is_file():
                _hash_file(sha, folder / name)
                break


def training_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe that determine a training, the ``voco`` section without its defaults."""
    kept = {key: value for key, value in values.items() if key not in IGNORED and value is not None}
    if isinstance(kept.get("voco"), Mapping):
        default = VoCoConfig().to_dict()
        given = VoCoConfig.from_dict(dict(kept["voco"])).to_dict()
        kept["voco"] = {key: value for key, value in given.items() if value != default[key]}
    return kept


def with_fingerprints(value: Any, fingerprint: Fingerprint) -> Any:
    """``value`` with each path in it, of a file, folder or package that is there, replaced by its
    fingerprint.
    """
    if isinstance(value, Mapping):
        return {key: with_fingerprints(inner, fingerprint) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_fingerprints(inner, fingerprint) for inner in value]
    if isinstance(value, str) and (os.sep in value or "/" in value or value.startswith(PACKAGE)):
        return fingerprint(value)
    return value


def training_key(values: Mapping[str, Any], fingerprint: Fingerprint) -> str:
    """The key of a training with the values of a recipe.

    The image folder counts through the data: listing hundreds of thousands of files would take minutes.
    """
    kept = training_values(values)
    kept.pop("image_folder", None)
    for key in ("model_name_or_path", "dataset_name"):
        if kept.get(key) is not None:
            kept[key] = fingerprint(str(kept[key]))
    return digest(with_fingerprints(kept, fingerprint))
