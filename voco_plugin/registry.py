"""Names → components, loaded when first asked for."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .config import nearest


def lazy_names(package: str, names: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names load when first used.

    Args:
        package: its ``__name__``.
        names: name → the module that has it, relative (``.attach``).
    """

    def load(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(names[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *names})


class Registry:
    """A named set of components of one sort.

    A component registers itself in its own file (``@families.register("llava")``), lazily by path
    (``families.register("llava", "voco_plugin.models.families.llava:Llava")``), or through the entry-point
    group ``voco_plugin.<name>`` of another package.

    Raises:
        ValueError: a name is registered twice, or asked for and unknown (the nearest known one is named).
    """

    def __repr__(self) -> str:
        return f"Registry({self.name!r}: {', '.join(self.list())})"

    def __init__(self, name: str) -> None:
        self.name = name
        self._entries: dict[str, Any] = {}
        self._scanned = False
        self._built_in = False

    def register(self, key: str, component: Any = None) -> Any:
        """Register ``component`` (an object, or ``"module:attribute"``); without one, a decorator."""
        if component is None:

            def decorate(value: Any) -> Any:
                self.register(key, value)
                return value

            return decorate
        self._load_built_in()
        if key in self._entries and self._entries[key] != component:
            raise ValueError(f"{self.name} already has {key!r}; choose another name.")
        self._entries[key] = component
        return component

    def _load_built_in(self) -> None:
        """Import the package of the same name, whose files register what is built in: before anything of a
        third party, so that the blame for a duplicate falls on the newcomer."""
        if self._built_in:
            return
        self._built_in = True
        module = f"voco_plugin.models.{self.name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)

    def _scan(self) -> None:
        self._load_built_in()
        if self._scanned:
            return
        self._scanned = True
        for point in entry_points(group=f"voco_plugin.{self.name}"):
            self.register(point.name, point.value)

    def get(self, key: str) -> Any:
        """The component called ``key``."""
        self._scan()
        if key not in self._entries:
            raise ValueError(
                f"{key!r} is not in the registry of {self.name}{nearest(key, self._entries)}; "
                f"known: {', '.join(self.list()) or 'none'}."
            )
        entry = self._entries[key]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = getattr(importlib.import_module(module), attribute)
            self._entries[key] = entry
        return entry

    def list(self) -> builtins.list[str]:
        """Every known name, sorted."""
        self._scan()
        return sorted(self._entries)

    def __contains__(self, key: str) -> bool:
        self._scan()
        return key in self._entries

    def decorator(self, *keys: str) -> Callable[[Any], Any]:
        """Register one component under several names."""

        def decorate(value: Any) -> Any:
            for key in keys:
                self.register(key, value)
            return value

        return decorate


_plugins: set[Path] = set()


def load_plugin(path: str | os.PathLike) -> None:
    """Run a Python file that registers components, once: ``--plugin my_file.py``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a Python file, or it fails; the message names the line.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"plugin {os.fspath(path)} does not exist; give a Python file.")
    if file in _plugins:
        return
    spec = importlib.util.spec_from_file_location(f"voco_plugin_{file.stem}", file)
    if file.suffix != ".py" or spec is None or spec.loader is None:
        raise ValueError(f"plugin {os.fspath(path)} is not a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename) == file]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"plugin {os.fspath(path)}{where}: {type(error).__name__}: {error}") from error
    _plugins.add(file)


families = Registry("families")
encoders = Registry("encoders")
llms = Registry("llms")
projectors = Registry("projectors")
compressors = Registry("compressors")
