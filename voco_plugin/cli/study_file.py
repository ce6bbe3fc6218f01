"""The YAML of a study: found by path or shipped name, changed by ``--set KEY=VALUE``, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import nearest
from ..evaluation.study.definition import Study
from ..files import PACKAGE
from . import recipe_values
from .recipe import load, recipe_folder
from .recipe_values import RecipeError, Text, plain


def shipped() -> dict[str, Path]:
    """Bare name → file of every shipped study."""
    return {path.stem: path for path in sorted((recipe_folder() / "studies").glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a study given as a path or a bare shipped name.

    Raises:
        RecipeError: there is none; the nearest name is given.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    raise RecipeError(
        f"no study {name!r}{nearest(path.stem, known)}; shipped: {', '.join(known)}, or give a path."
    )


def load_study(name: str, changes: Sequence[str] = ()) -> tuple[Path, Study]:
    """Read and check a study.

    Args:
        changes: ``KEY=VALUE``, a dotted key into a section, the value as YAML.

    Raises:
        RecipeError: it does not exist or is not YAML, or a key or value is wrong.
    """
    path = find(name)
    values, lines = recipe_values.read(path)
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {change!r} is no change; write --set KEY=VALUE, as in --set seeds=[0].")
        put(values, key.split("."), plain(Text(text)), change)
    try:
        return path, Study.from_dict(values)
    except ValueError as problem:
        raise RecipeError(f"{path.name}: {problem}") from None


def put(values: dict[str, Any], parts: Sequence[str], value: Any, change: str) -> None:
    """Put ``value`` at the dotted key.

    Overrides are dotted keys themselves: what follows ``overrides`` or a method's name is one.
    """
    inside = {"overrides": 1, "methods": 2}.get(parts[0])
    parts = list(parts) if inside is None else [*parts[:inside], ".".join(parts[inside:])]
    parts = [part for part in parts if part]
    target = values
    for part in parts[:-1]:
        inner = target.get(part)
        if inner is not None and not isinstance(inner, Mapping):
            raise RecipeError(f"--set {change}: {part!r} is {inner!r}, not a section.")
        target[part] = dict(inner or {})
        target = target[part]
    target[parts[-1]] = value


def resolve(recipe: str, words: Sequence[str]) -> dict[str, Any]:
    """The checked values of a recipe under override words."""
    return load(recipe, words).values


def count_rows(data: str, split: str | None = None, before: Sequence[str] = ()) -> int:
    """How many rows a training set has: a LLaVA file, or what ``datasets`` reads.

    Args:
        before: the commands that make it, for the error.

    Raises:
        RecipeError: it is not there.
    """
    from ..data.loaders import load_vision_dataset, read_records

    path = Path(data).expanduser()
    if not path.exists() and not data.startswith(PACKAGE):
        made = f" ({'; '.join(before)})" if before else ""
        raise RecipeError(
            f"search.last counts the rows of the training set, and {data} is not there; write it{made}, or "
            "give search.data, a validation set of its own."
        )
    if path.is_file() and path.suffix.lower() in (".json", ".jsonl"):
        return len(read_records(path))
    return len(load_vision_dataset(data, split))
