"""The values of a recipe: YAML read safely, ``--key value`` overrides, and the type that each key takes."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import nearest


class RecipeError(ValueError):
    """A recipe does not exist, cannot be read, or has a key or value that is wrong."""


# -- reading
# -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML-safe, and a key given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a name", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A recipe file's keys and values, and the line of each key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text file: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{place}: {getattr(error, 'problem', None) or error}") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{path} holds a {type(values).__name__}: a recipe is a mapping, `key: value` lines."
        )
    for key in values:
        if not isinstance(key, str):
            raise RecipeError(f"{path}: the key {key!r} must be a name.")
    return values, {k.value: k.start_mark.line + 1 for k, _ in node.value}


def overrides(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """``--key value``, ``--key=value``, ``--key a b`` (a list) and a bare ``--key`` (true) → (key, texts)."""
    items = list(arguments)
    while items:
        head = items.pop(0)
        if not head.startswith("--") or len(head) < 3:
            raise RecipeError(f"{head!r} is not an override: write --key value.")
        key, equals, text = head[2:].partition("=")
        texts = [text] if equals else []
        while items and not equals and not items[0].startswith("--"):
            texts.append(items.pop(0))
        yield key.replace("-", "_"), texts


class Text(str):
    """A value typed on the command line: its type is decided by the key's."""


def override(given: dict[str, Any], key: str, texts: list[str]) -> None:
    """Put one override into ``given``; a dotted key goes into a section."""
    parts = key.split(".")
    value: Any = [Text(t) for t in texts] if len(texts) > 1 else Text(texts[0]) if texts else True
    target = given
    for part in parts[:-1]:
        inner = target.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise RecipeError(f"--{key} {' '.join(texts)}: {part!r} is {inner!r}, not a section.")
        target[part] = dict(inner or {})
        target = target[part]
    if len(parts) > 1:  # inside a section there is no field to read the type from, so YAML says it
        value = [plain(t) for t in value] if isinstance(value, list) else plain(value)
    target[parts[-1]] = value


def plain(value: Any) -> Any:
    """What YAML makes of a text of the command line; ``1e-3`` is a number too."""
    if not isinstance(value, Text):
        return value
    try:
        parsed = yaml.safe_load(str(value))
    except yaml.YAMLError:
        return str(value)
    if isinstance(parsed, str):
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


# -- types
# -----------------------------------------------------------------------------------------------------------


def coerce(key: str, value: Any, hint: Any, choices: Any, where: str) -> Any:
    """``value`` as the type that ``key`` takes.

    Raises:
        RecipeError: it is of another type, or none of the choices.
    """
    options = _options(hint)
    if isinstance(value, str) and str in options and not value.strip().startswith("["):
        options.sort(
            key=lambda option: option is list or typing.get_origin(option) is list
        )  # a text before a list of one
    if isinstance(value, Text) and str(value).lower() in ("null", "none") and type(None) in options:
        value = None
    for option in options:
        ok, converted = _fits(value, option)
        if ok:
            if choices is not None and converted is not None and converted not in list(choices):
                allowed = [str(c) for c in choices]
                hint_text = nearest(str(converted), allowed)
                raise RecipeError(
                    f"{where}{key}={show(value)} is not known{hint_text}; use one of {', '.join(allowed)}."
                )
            return converted
    names = [n for option in options if (n := _name(option))]
    members = [str(m.value) for option in options if _is_enum(option) for m in option]
    if members and isinstance(value, str):
        raise RecipeError(
            f"{where}{key}={show(value)} is not known{nearest(value, members)}; use one of "
            f"{', '.join(members)}."
        )
    raise RecipeError(
        f"{where}{key}={show(value)} is {_article(value)}, and {key} takes "
        f"{' or '.join(dict.fromkeys(names))}."
    )


def _options(hint: Any) -> list[Any]:
    """The members of a union, exact types first; a text that an enum lists must be one of its values."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = list(typing.get_args(hint)) if union else [hint]
    if any(_is_enum(option) for option in options):
        options = [option for option in options if option is not str]
    order = {type(None): 0, bool: 1, int: 2, float: 3}
    return sorted(options, key=lambda o: order.get(o, 9 if o is str else 5) if isinstance(o, type) else 5)


def _is_enum(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, enum.Enum)


def _fits(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether ``value`` is an ``option``, and what it is as one."""
    origin = typing.get_origin(option)
    if option is Any:
        return True, plain(value)
    if option is type(None):
        return value is None, None
    if origin is typing.Literal:
        value = plain(value)
        return any(value == a and type(value) is type(a) for a in typing.get_args(option)), value
    if _is_enum(option):
        return any(value == m.value for m in option), str(value)
    if option is str:
        return isinstance(value, str), str(value)
    if option is list or origin is list:
        return _fits_list(value, typing.get_args(option))
    value = plain(value)
    if option is dict or origin is dict:
        return isinstance(value, dict), value
    if option is bool:
        return isinstance(value, bool), value
    if option is int:
        whole = isinstance(value, float) and value.is_integer()
        return (isinstance(value, int) and not isinstance(value, bool)) or whole, int(
            value
        ) if whole else value
    if option is float:
        if isinstance(value, str):  # YAML reads 2e-5 as a text
            try:
                return True, float(value)
            except ValueError:
                return False, value
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return good, float(value) if good else value
    return isinstance(option, type) and isinstance(value, option), value


def _fits_list(value: Any, inner: tuple[Any, ...]) -> tuple[bool, Any]:
    if isinstance(value, Text) and value.strip().startswith("["):
        value = plain(value)
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if value is None or isinstance(value, (dict, bool)):
        return False, value
    if not inner:
        return True, [plain(i) for i in items]
    pairs = [next((p for o in _options(inner[0]) if (p := _fits(i, o))[0]), (False, i)) for i in items]
    return all(ok for ok, _ in pairs), [v for _, v in pairs]


def _name(option: Any) -> str:
    if option is type(None):
        return "null"
    if typing.get_origin(option) is list:
        return "a list"
    if typing.get_origin(option) is typing.Literal:
        return " or ".join(repr(a) for a in typing.get_args(option))
    if typing.get_origin(option) is dict:
        return "a section"
    known = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a text",
        dict: "a section",
        list: "a list",
    }
    return known.get(option, getattr(option, "__name__", str(option)))


def _article(value: Any) -> str:
    kinds = {bool: "true/false", int: "an integer", float: "a number", dict: "a section", type(None): "null"}
    return "a list" if isinstance(value, list) else kinds.get(type(value), "a text")


def show(value: Any) -> str:
    return repr(str(value)) if isinstance(value, str) else "null" if value is None else repr(value)
