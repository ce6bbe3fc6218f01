"""The keys of a recipe without importing what they belong to: torch, transformers and TRL take ten seconds.

The names of a dataclass's fields are read from the source that is installed, so that there is no list here to
grow stale. Where the source is not laid out as expected there is no answer, and the check waits for the
import.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

_ROOTS = {
    "VoCoSFTConfig": ("voco_plugin", "training/config.py"),
    "ModelConfig": ("trl", "trainer/model_config.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "TrainingArguments": ("transformers", "training_args.py"),
}
"""Class → package and file: the classes whose fields are keys, and those they inherit from."""


@functools.cache
def field_names(name: str) -> frozenset[str] | None:
    """The fields that the dataclass ``name`` takes, its bases' too; ``None`` where the source does not
    tell."""
    if name not in _ROOTS:
        return None
    package, file = _ROOTS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    try:
        source = (Path(spec.origin).parent / file).read_text(encoding="utf-8")
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    except (OSError, SyntaxError, ValueError):
        return None
    found = next((node for node in classes if node.name == name), None)
    if found is None or found.keywords:
        return None
    names: set[str] = set()
    for base in found.bases:
        inherited = field_names(base.id) if isinstance(base, ast.Name) else None
        if inherited is None:
            return None
        names |= inherited
    for node in ast.walk(found):
        if isinstance(node, ast.FunctionDef):
            node.body = []  # its variables are no fields
    for node in ast.walk(found):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _left_out(node):
            names.add(node.target.id)
    return frozenset(names)


def _left_out(node: ast.AnnAssign) -> bool:
    """Whether it is no argument of the constructor."""
    if "ClassVar" in ast.unparse(node.annotation):
        return True
    if not isinstance(node.value, ast.Call):
        return False
    return any(k.arg == "init" and ast.unparse(k.value) == "False" for k in node.value.keywords)
