"""Checks of a YAML's values: sections, texts, whole numbers and choices, each error naming the key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ...config import nearest


def from_mapping(cls: Any, values: Any, where: str) -> Any:
    """``cls(**values)``, an unknown key refused with the nearest known one.

    Raises:
        ValueError: ``values`` is not a mapping, a key is unknown or missing, or a value is wrong.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}={values!r} must be a section, `key: value` lines.")
    fields = [f for f in dataclasses.fields(cls) if f.init]
    known = [f.name for f in fields]
    for key in values:
        if key not in known:
            raise ValueError(
                f"{where} has no key {key!r}{nearest(str(key), known)}; it has {', '.join(known)}."
            )
    for field in fields:
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and values.get(field.name) is None:
            raise ValueError(f"{where} has no {field.name}: add it.")
    try:
        return cls(**values)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from None


def flatten(values: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """Overrides with sections (``voco: {rule: star}``) as dotted keys (``voco.rule``)."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}={values!r} must be a section of the recipe's keys.")
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}: the key {key!r} must be a name.")
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{where}.{key}", f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def text(name: str, value: Any) -> None:
    """Refuse what is neither a text nor nothing."""
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(f"{name}={value!r} must be a text.")


def whole(name: str, value: Any, low: int = 1) -> None:
    """Refuse what is neither a whole number of at least ``low`` nor nothing."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}.")


def wholes(name: str, value: Any, low: int = 1) -> list[int] | None:
    """One or several different whole numbers, as a list; nothing stays nothing."""
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{name} is empty; give at least one number, as in [1, 4].")
    for one in values:
        whole(name, one, low)
        if one is None:
            raise ValueError(f"{name}={value!r} must be whole numbers.")
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={value!r} names a number twice.")
    return values


def choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse what is neither one of ``allowed`` nor nothing."""
    if value is not None and value not in allowed:
        raise ValueError(
            f"{name}={value!r} is not known{nearest(str(value), allowed)}; use one of {', '.join(allowed)}."
        )
