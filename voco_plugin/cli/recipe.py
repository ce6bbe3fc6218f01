"""A training recipe: YAML, overridden by ``--key value``, checked before anything loads.

A recipe's keys are the fields of three configs that TRL users know, flat, and of this file's
``RecipeArguments``:

    trl.ModelConfig        model_name_or_path, dtype, use_peft, lora_r, lora_alpha, lora_target_modules, …
    vp.VoCoSFTConfig       learning_rate, max_steps, num_tokens_range, … (trl.SFTConfig and TrainingArguments)
                           and the nested sections  voco: {num_tokens, rule, …}  (VoCoConfig) and
                           distill: {teacher, weight, …}  (DistillConfig)
                           or, in place of model_name_or_path, the nested section
                           model: {encoder, llm, projector, …}  (vp.compose)
    RecipeArguments        dataset_name, image_folder, accelerate_config, …

The ``voco`` section is checked before torch is imported, every key and type before a model loads.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import VoCoConfig, nearest
from ..models.composition import KEYS, check_names
from ..registry import load_plugin
from . import recipe_values
from .recipe_keys import field_names
from .recipe_values import RecipeError


@dataclasses.dataclass
class RecipeArguments:
    """The keys of a recipe that belong to neither the model nor the trainer.

    Args:
        model: the section ``model: {encoder:, llm:, projector:, …}`` composes a model, in place of
            ``model_name_or_path``: the arguments of :func:`voco_plugin.compose`.
        plugin: Python files that register encoders, LLMs, projectors or families.
        dataset_name: LLaVA JSON file, ``datasets`` folder, local files, hub id or ``package:easy_vqa`` to
            train on.
        dataset_train_split: its split; ``None`` takes the only one, or ``train``. A LLaVA file has none.
        image_folder: where the image names of a LLaVA file start.
        video_folder: where the video names of a WebVid CSV, Video-ChatGPT or LLaVA JSON start;
            ``dataset_name`` may then name several of these, with commas between them.
        video_frames: frames read of each video, evenly; or
        video_fps: frames read of each second, and of these at most
        video_max_frames: in all.
        eval_dataset_name: what to evaluate on (with ``eval_strategy``); ``None`` takes ``dataset_test_split``
            of ``dataset_name``.
        dataset_test_split: the split of the evaluation set.
        eval_image_folder: ``image_folder`` of ``eval_dataset_name``; ``None``: the same.
        max_train_samples: the first so many rows only.
        overwrite: train over a finished run in ``output_dir``.
        accelerate_config: launch through ``accelerate``: one of TRL's profiles (``single_gpu``,
            ``multi_gpu``, ``zero1``…``zero3``, ``fsdp1``, ``fsdp2``) or a file.
        num_processes: overrides the profile's number of processes.
        env: environment variables to set before training.
    """

    model: dict[str, Any] | None = None
    plugin: list[str] | None = None
    dataset_name: str | None = None
    dataset_train_split: str | None = None
    image_folder: str | None = None
    video_folder: str | None = None
    video_frames: int | None = None
    video_fps: float | None = None
    video_max_frames: int | None = None
    eval_dataset_name: str | None = None
    dataset_test_split: str | None = None
    eval_image_folder: str | None = None
    max_train_samples: int | None = None
    overwrite: bool = False
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
    """Bare name → file of every shipped recipe (``studies/`` holds studies, see ``study_file.py``)."""
    found = sorted(recipe_folder().rglob("*.yaml"))
    return {path.stem: path for path in found if path.parent.name != "studies"}


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
    for line in path.read_text(encoding="utf-8-sig").splitlines():
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
    given, lines, where = _given(path, overrides)
    _load_plugins(given, where, path.parent if where.get("plugin") else None)
    _check_model(given, where)
    known = schema()
    _check_keys(given, known, where)
    _check_distill(given, where)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        hint, choices = known[key]
        checked[key] = recipe_values.coerce(key, value, hint, choices, where.get(key, ""))
    return Recipe(path, checked, lines)


def named_inputs(name: str, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, str | None]]:
    """The recipe's file, and the model and data sets that it names after the overrides; nothing heavy is
    imported.

    Raises:
        RecipeError: see :func:`load`, as far as that takes no import.
    """
    path = find(name)
    given, _, _ = _given(path, overrides)
    keys = ("model_name_or_path", "dataset_name", "eval_dataset_name")
    values = {key: recipe_values.plain(given.get(key)) for key in keys}
    return path, {key: value if isinstance(value, str) else None for key, value in values.items()}


def _given(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, int], dict[str, str]]:
    """A recipe's values under its overrides, the line of each key, and where a wrong one stands, in words;
    checked as far as that takes no import.
    """
    given, lines = recipe_values.read(path)
    texts = dict(recipe_values.overrides(overrides))
    for key, values in texts.items():
        recipe_values.override(given, key, values)
    where = {key: f"{path.name}, line {line}: " for key, line in lines.items()}
    where |= {key.split(".")[0]: "" for key in texts}  # the command line needs no place
    _check_voco(given, where)
    names = _names()
    if names is not None:
        _check_keys(given, names, where)
    return given, lines, where


# -- checking
# ----------------------------------------------------------------------------------------------------------


def _names() -> set[str] | None:
    """Every key of a recipe, read off the sources; ``None`` where they do not tell."""
    found = [field_names("VoCoSFTConfig"), field_names("ModelConfig")]
    if any(names is None for names in found):
        return None
    return {f.name for f in dataclasses.fields(RecipeArguments)}.union(*(names or () for names in found))


def _check_keys(given: dict[str, Any], known: Iterable[str], where: Mapping[str, str]) -> None:
    for key in given:
        if key not in known:
            raise RecipeError(
                f"{where.get(key, '')}unknown key {key!r}{nearest(key, known)}; "
                "see trl.ModelConfig, VoCoSFTConfig and `voco recipes show` for the keys."
            )


def _check_voco(given: dict[str, Any], where: Mapping[str, str]) -> None:
    """The ``voco`` section, which needs nothing but ``VoCoConfig``."""
    if "voco" not in given:
        return
    section = recipe_values.plain(given["voco"])
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


def _load_plugins(given: dict[str, Any], where: Mapping[str, str], folder: Path | None) -> None:
    """Run the files of ``plugin``, so that the names they register are known to every later check.

    Args:
        folder: of the recipe that names them, where a relative path starts; where there is no such file, and
            with ``None`` (they were typed), it starts in the working directory. The paths found are put into
            ``given``: a process that is launched reads them there.
    """
    files = given.get("plugin")
    if files is None:
        return
    found = []
    for file in files if isinstance(files, list) else [files]:
        if not isinstance(file, str):
            raise RecipeError(f"{where.get('plugin', '')}plugin={file!r} must be the path of a Python file.")
        beside = None if folder is None else folder / Path(file).expanduser()
        place = str(beside) if beside is not None and beside.is_file() else str(file)
        try:
            load_plugin(place)
        except (ValueError, OSError) as error:
            also = "" if beside is None or Path(file).is_absolute() else f" (nor does {beside})"
            missing = isinstance(error, FileNotFoundError)
            raise RecipeError(f"{where.get('plugin', '')}{error}{also if missing else ''}") from None
        found.append(place)
    given["plugin"] = found


def _check_model(given: dict[str, Any], where: Mapping[str, str]) -> None:
    """The ``model`` section: every key and every name, and that no other model is named."""
    if "model" not in given:
        return
    place = where.get("model", "")
    section = recipe_values.plain(given["model"])
    given["model"] = section
    if section is None:
        return
    if not isinstance(section, dict):
        raise RecipeError(
            f"{place}model={section!r} must be a section (encoder, llm, projector, …); for a checkpoint "
            "or hub id write model_name_or_path."
        )
    if given.get("model_name_or_path") is not None:
        raise RecipeError(
            f"{place}both a model section and model_name_or_path={str(given['model_name_or_path'])!r} are "
            "given; leave one out (--model null, --model_name_or_path null)."
        )
    for key in section:
        if key not in KEYS:
            raise RecipeError(
                f"{place}model has no key {key!r}{nearest(key, KEYS)}; it has {', '.join(KEYS)}."
            )
    for key in ("encoder", "llm"):
        if not section.get(key):
            raise RecipeError(f"{place}model has no {key}: add it, or give --model.{key} NAME.")
    try:
        check_names(**section)
    except FileNotFoundError:
        pass  # a folder may still be made; `train` refuses it before anything loads
    except (ValueError, OSError, ImportError) as error:
        raise RecipeError(f"{place}model: {error}") from None


def _check_distill(given: dict[str, Any], where: Mapping[str, str]) -> None:
    """The ``distill`` section: every key, its type, and what ``DistillConfig`` says of their values."""
    if "distill" not in given:
        return
    from ..training.distillation.config import DistillConfig

    place = where.get("distill", "")
    section = recipe_values.plain(given["distill"])
    given["distill"] = section
    if section is None:
        return
    if not isinstance(section, dict):
        raise RecipeError(f"{place}distill={section!r} must be a section of DistillConfig's fields, or null.")
    hints = typing.get_type_hints(DistillConfig)
    try:
        DistillConfig.from_dict({key: None for key in section if key not in hints})
        given["distill"] = {
            key: recipe_values.coerce(key, value, hints[key], None, "") for key, value in section.items()
        }
        DistillConfig.from_dict(given["distill"])
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{place}distill: {error}") from None


def schema() -> dict[str, tuple[Any, Any]]:
    """Every key of a recipe → (type hint, allowed values or ``None``). Imports torch, and loads no model.

    Raises:
        ImportError: TRL, whose arguments most of them are, is missing.
    """
    from ..training.trl_floor import check_trl

    check_trl()
    from trl import ModelConfig

    from ..training.config import VoCoSFTConfig

    found: dict[str, tuple[Any, Any]] = {}
    for cls in (VoCoSFTConfig, ModelConfig, RecipeArguments):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init:
                found[field.name] = (hints[field.name], field.metadata.get("choices"))
    return found
