"""Docstrings name other objects in Sphinx's roles (``:class:`~voco_plugin.VoCoCache```); the site links them.

An extension of griffe, by which mkdocstrings reads the sources. A public name becomes a link to its place in
the reference, any other name is set as code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent))  # griffe loads this file by its path

from names import linked, public_names  # noqa: E402


class Roles(griffe.Extension):
    """Rewrites each docstring when its object has been read."""

    def __init__(self) -> None:
        super().__init__()
        self.public = public_names(Path(__file__).resolve().parents[2] / "voco_plugin")

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = linked(obj.docstring.value, self.public)
