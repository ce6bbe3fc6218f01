"""Docstrings name other objects in Sphinx's roles (``:class:`~voco_plugin.VoCoCache```); the site links them.

An extension of griffe, by which mkdocstrings reads the sources. A public name becomes a link to its place in
the reference, any other name is set as code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(~?)([\w.]+)`")


def public_names(package: Path) -> list[str]:
    """The names of ``voco_plugin`` that load when first used, read off its source without importing it."""
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_NAMES":
            return list(ast.literal_eval(node.value))
    raise LookupError(f"{package / '__init__.py'} has no _NAMES")


def linked(text: str, public: list[str]) -> str:
    """``text`` with its roles as Markdown."""

    def one(found: re.Match[str]) -> str:
        short, path = found.groups()
        last = path.rsplit(".", 1)[-1]
        if last in public:
            return f"[`{last}`][voco_plugin.{last}]"
        return f"`{last if short else path.lstrip('.')}`"

    return ROLE.sub(one, text)


class Roles(griffe.Extension):
    """Rewrites each docstring when its object has been read."""

    def __init__(self) -> None:
        super().__init__()
        self.public = public_names(Path(__file__).resolve().parents[2] / "voco_plugin")

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = linked(obj.docstring.value, self.public)
