"""A training recipe: YAML, overridden by ``--key value``, checked before anything loads.

A recipe's keys are the fields of three configs that TRL users know, flat, and of this file's
``RecipeArguments``:

    trl.ModelConfig        model_name_or_path, dtype, use_peft, lora_r, lora_alpha, lora_target_modules, …
    vp.VoCoSFTConfig       learning_rate, max_steps, num_tokens_range, … (trl.SFTConfig and TrainingArguments)
                           and the nested section  voco: {num_tokens, rule, …}  (VoCoConfig)
    RecipeArguments        dataset_name, image_folder, accelerate_config, …

The ``voco`` section is checked before torch is imported, every key and type before a model loads.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import VoCoConfig, nearest


class RecipeError(ValueError):
    """A recipe does not exist, cannot be read, or has a key or value that is wrong."""


@dataclasses.dataclass
class RecipeArguments:
    """The keys of a recipe that belong to neither the model nor the trainer.

    Args:
        dataset_name: LLaVA JSON file, ``datasets`` folder, local files or hub id to train on.
        dataset_train_split: its split; ``None`` takes the only one, or ``train``. A LLaVA file has none.
        image_folder: where the image names of a LLaVA file start.
        eval_dataset_name: what to evaluate on (with ``eval_strategy``); ``None`` takes ``dataset_test_split``
            of ``dataset_name``.
        dataset_test_split: the split of the evaluation set.
        eval_image_folder: ``image_folder`` of ``eval_dataset_name``; ``None``: the same.
        max_train_samples: the first so many rows only.
        accelerate_config: launch through ``accelerate``: one of TRL's profiles (``single_gpu``,
            ``multi_gpu``, ``zero1``…``zero3``, ``fsdp1``, ``fsdp2``) or a file.
        num_processes: overrides the profile's number of processes.
        env: environment variables to set before training.
    """

    dataset_name: str | None = None
    dataset_train_split: str | None = None
    image_folder: str | None = None
    eval_dataset_name: str | None = None
    dataset_test_split: str | None = None
    eval_image_folder: str | None = None
    max_train_samples: int | None = None
    accelerate_config: str | None = None
    num_processes: int | None = None
    env: dict[str, Any] | None = None


@dataclasses.dataclass
class Recipe:
    """A checked recipe: the file it came from and the values of its keys, of the right types."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int] = dataclasses.field(default_factory=dict)

    def arguments(self, cls: Any, **more: Any) -> Any:
        """``cls(...)`` of the values that are its fields; ``more`` wins."""
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        return cls(**({k: v for k, v in self.values.items() if k in names} | more))


# -- finding
# -----------------------------------------------------------------------------------------------------------


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped() -> dict[str, Path]:
    """Bare name → file of every shipped recipe."""
    return {path.stem: path for path in sorted(recipe_folder().rglob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a recipe given as a path or a bare shipped name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    if path.is_dir():
        raise RecipeError(f"{name} is a folder: give a recipe file, or a shipped name ({', '.join(known)}).")
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        hint = f" (did you mean the shipped recipe {path.stem!r}?)" if path.stem in known else ""
        raise RecipeError(f"recipe {name} does not exist{hint}; shipped: {', '.join(known)}.")
    raise RecipeError(
        f"no recipe {name!r}{nearest(name, known)}; shipped: {', '.join(known)}, or give a path."
    )


def summary(path: Path) -> str:
    """The first comment line of a recipe."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""


# -- reading
# -----------------------------------------------------------------------------------------------------------


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe and its ``--key value`` overrides.

    Raises:
        RecipeError: the recipe does not exist or is not YAML; a key is unknown (the nearest one is named) or
            given twice; a value has the wrong type.
    """
    path = find(name)
    raw, lines = _read(path)
    given = dict(raw)
    texts = dict(_overrides(overrides))
    for key, values in texts.items():
        _override(given, key, values)
    where = {key: f"{path.name}, line {line}: " for key, line in lines.items()}
    where |= {key.split(".")[0]: "" for key in texts}  # the command line needs no place
    _check_voco(given, where)
    known = schema()
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise RecipeError(
                f"{where.get(key, '')}unknown key {key!r}{nearest(key, known)}; "
                "see trl.ModelConfig, VoCoSFTConfig and `voco recipes show` for the keys."
            )
        hint, choices = known[key]
        checked[key] = _coerce(key, value, hint, choices, where.get(key, ""))
    return Recipe(path, checked, lines)


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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
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


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
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


def _override(given: dict[str, Any], key: str, texts: list[str]) -> None:
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
        value = [_plain(t) for t in value] if isinstance(value, list) else _plain(value)
    target[parts[-1]] = value


def _plain(value: Any) -> Any:
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


# -- checking
# ----------------------------------------------------------------------------------------------------------


def _check_voco(given: dict[str, Any], where: Mapping[str, str]) -> None:
    """The ``voco`` section, which needs nothing but ``VoCoConfig``."""
    if "voco" not in given:
        return
    section = _plain(given["voco"])
    given["voco"] = section
    if section is None:
        return
    if not isinstance(section, dict):
        raise RecipeError(
            f"{where.get('voco', '')}voco={section!r} must be a section of VoCoConfig's fields, or null."
        )
    try:
        VoCoConfig.from_dict(section)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where.get('voco', '')}voco: {error}") from None


def schema() -> dict[str, tuple[Any, Any]]:
    """Every key of a recipe → (type hint, allowed values or ``None``). Imports torch, and loads no model."""
    from trl import ModelConfig

    from ..training.config import VoCoSFTConfig

    found: dict[str, tuple[Any, Any]] = {}
    for cls in (VoCoSFTConfig, ModelConfig, RecipeArguments):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init:
                found[field.name] = (hints[field.name], field.metadata.get("choices"))
    return found


def _coerce(key: str, value: Any, hint: Any, choices: Any, where: str) -> Any:
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
                    f"{where}{key}={_show(value)} is not known{hint_text}; use one of {', '.join(allowed)}."
                )
            return converted
    names = [n for option in options if (n := _name(option))]
    members = [str(m.value) for option in options if _is_enum(option) for m in option]
    if members and isinstance(value, str):
        raise RecipeError(
            f"{where}{key}={_show(value)} is not known{nearest(value, members)}; use one of "
            f"{', '.join(members)}."
        )
    raise RecipeError(
        f"{where}{key}={_show(value)} is {_article(value)}, and {key} takes "
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
        return True, _plain(value)
    if option is type(None):
        return value is None, None
    if origin is typing.Literal:
        plain = _plain(value)
        return any(plain == a and type(plain) is type(a) for a in typing.get_args(option)), plain
    if _is_enum(option):
        return any(value == m.value for m in option), str(value)
    if option is str:
        return isinstance(value, str), str(value)
    if option is list or origin is list:
        return _fits_list(value, typing.get_args(option))
    value = _plain(value)
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
        value = _plain(value)
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if value is None or isinstance(value, (dict, bool)):
        return False, value
    if not inner:
        return True, [_plain(i) for i in items]
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


def _show(value: Any) -> str:
    return repr(str(value)) if isinstance(value, str) else "null" if value is None else repr(value)
