"""What a command needs, asked before it works: models and data that are there, packages, places to write to.

Imports neither torch nor a model: a missing file is said at once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..data.easy_vqa import easy_vqa_folder
from ..files import PACKAGE
from ..models.model_paths import check_model_path, looks_local

_DATA = (".json", ".jsonl", ".csv", ".parquet")


def commands_before(*files: Path) -> list[str]:
    """The commands that the header of a recipe or study names as coming before it (``# before: …``)."""
    found: list[str] = []
    for file in files:
        for line in file.read_text(encoding="utf-8-sig").splitlines():
            if line.startswith("# before:"):
                command = line.removeprefix("# before:").split("   (")[0].strip()
                found.append(command)
    return list(dict.fromkeys(found))


def check_inputs(
    models: Mapping[str, Any], data: Mapping[str, Any], before: Iterable[str] = (), fix: str = "--{} VALUE"
) -> None:
    """Refuse models and data sets that are local and not there.

    Args:
        models, data: key → name, or ``None``.
        before: the commands that make them.
        fix: how another is given, ``{}`` being the key.

    Raises:
        FileNotFoundError: it names the key's value and the commands.
        ValueError: a model is a file, or a model or package of a kind that is not read.
    """
    made = "; ".join(f"`{command}`" for command in before)
    hint = f" What comes before: {made}." if made else ""
    for name in models.values():
        if isinstance(name, str):
            try:
                check_model_path(name)
            except FileNotFoundError as problem:
                raise FileNotFoundError(f"{problem}{hint}") from None
    for key, names in data.items():
        for name in str(names).split(",") if isinstance(names, str) else ():
            name = name.strip()
            if name.startswith(PACKAGE):
                easy_vqa_folder(name)  # raises where it is not installed, or holds none
            elif (looks_local(name) or name.endswith(_DATA)) and not Path(name).expanduser().exists():
                raise FileNotFoundError(
                    f"{key} {name} does not exist; write it, or give {fix.format(key)}.{hint}"
                )


def check_packages(needed: Mapping[str, str], what: str) -> None:
    """Refuse to begin ``what`` without the packages that it ends with.

    Args:
        needed: module → how it is installed.

    Raises:
        ImportError: one is not installed.
    """
    for module, install in needed.items():
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{what} needs {module}: pip install {install}.")


def check_target(path: str | os.PathLike | None, option: str) -> None:
    """Refuse a file that could not be written when the work is done.

    Raises:
        ValueError: it is a folder, or lies below a file.
        PermissionError: its folder may not be written to.
    """
    if path is None:
        return
    target = Path(path).expanduser()
    if target.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file.")
    above = target.parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{option}: {above} is a file, not a folder.")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{option}: {above} may not be written to.")
