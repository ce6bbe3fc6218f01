"""What a checkpoint holds so that ``AutoModelForImageTextToText.from_pretrained(folder,
trust_remote_code=True)`` gives the model with its rule: ``modeling_voco.py``, and ``auto_map`` in
``config.json``.

The file holds no model: it imports this package, or says that it is missing. Without ``trust_remote_code``
transformers looks at neither and loads the plain class.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import atomic_write_text

FILE_NAME = "modeling_voco.py"
_CLASS = "VoCoForImageTextToText"
_REFERENCE = f"{Path(FILE_NAME).stem}.{_CLASS}"
_AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")
_TEXT = f'''"""This model compresses each image into a few tokens inside the language model (VoCo).

The rule is not in the weights but in the package voco_plugin, which trust_remote_code=True finds through this
file.
"""

try:
    from voco_plugin.models.auto_class import AttachedModel
except ModuleNotFoundError as problem:
    if (problem.name or "").split(".")[0] != "voco_plugin":
        raise
    raise ImportError(
        "this model compresses images with the package voco_plugin, which is not installed (or too old): "
        "pip install -U voco_plugin. Without trust_remote_code it loads as a plain model, without its rule."
    ) from problem


class {_CLASS}(AttachedModel):
    pass
'''


def write_modeling_file(folder: str | os.PathLike, model: Any) -> bool:
    """Put the file into a saved model's folder and name it in its config, for every auto class that loads
    ``model``'s class.

    Returns:
        whether that was done: a model whose own code another library wrote into the folder keeps that.
    """
    place = Path(folder) / "config.json"
    if not place.is_file():
        return False
    config = json.loads(place.read_text(encoding="utf-8"))
    named = {name: ref for name, ref in (config.get("auto_map") or {}).items() if not is_ours(ref)}
    fitting = [name for name in _AUTO_CLASSES if name not in named and _loads(name, model)]
    if not fitting or named.keys() & set(_AUTO_CLASSES):
        return False
    atomic_write_text(Path(folder) / FILE_NAME, _TEXT)
    config["auto_map"] = {**named, **dict.fromkeys(fitting, _REFERENCE)}
    atomic_write_text(place, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return True


def _loads(name: str, model: Any) -> bool:
    """Whether the auto class ``name`` gives the class of ``model`` for its config."""
    import transformers

    mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
    if mapping is None or type(model.config) not in mapping:
        return False
    found = mapping[type(model.config)]
    return any(
        cls.__name__ == type(model).__name__ for cls in (found if isinstance(found, tuple) else [found])
    )


def is_ours(reference: Any) -> bool:
    """Whether an entry of ``auto_map`` names our file, in this folder or in a repository."""
    return isinstance(reference, str) and reference.rpartition("--")[2] == _REFERENCE


def names_our_file(config_file: str | None) -> bool:
    """Whether a ``config.json`` names our file."""
    if config_file is None:
        return False
    named = json.loads(Path(config_file).read_text(encoding="utf-8")).get("auto_map") or {}
    return any(is_ours(reference) for reference in named.values())


def forget_file(config: Any) -> None:
    """Take our file out of a config in memory: whoever saves it with the rule names it anew, and whoever
    saves it without has no such file.
    """
    named = getattr(config, "auto_map", None)
    if not isinstance(named, dict) or not any(map(is_ours, named.values())):
        return
    rest = {name: reference for name, reference in named.items() if not is_ours(reference)}
    if rest:
        config.auto_map = rest
    else:
        del config.auto_map


__all__ = ["FILE_NAME", "forget_file", "is_ours", "names_our_file", "write_modeling_file"]
