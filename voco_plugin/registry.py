"""Names → components, loaded when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from .config import nearest


class Registry:
    """A named set of components of one sort.

    A component registers itself in its own file (``@families.register("llava")``), lazily by path
    (``families.register("llava", "voco_plugin.families.llava:Llava")``), or through the entry-point group
    ``voco_plugin.<name>`` of another package.

    Raises:
        ValueError: a name is registered twice, or asked for and unknown (the nearest known one is named).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._entries: dict[str, Any] = {}
        self._scanned = False

    def register(self, key: str, component: Any = None) -> Any:
        """Register ``component`` (an object, or ``"module:attribute"``); without one, a decorator."""
        if component is None:

            def decorate(value: Any) -> Any:
                self.register(key, value)
                return value

            return decorate
        if key in self._entries and self._entries[key] != component:
            raise ValueError(f"{self.name} already has {key!r}; choose another name.")
        self._entries[key] = component
        return component

    def _scan(self) -> None:
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

    def list(self) -> list[str]:
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


families = Registry("families")
encoders = Registry("encoders")
llms = Registry("llms")
projectors = Registry("projectors")
compressors = Registry("compressors")
