"""Registers the one model class of this package with transformers, as late as possible.

``AutoModel`` has to know ``open_clip_vision`` before a composed checkpoint with an open_clip tower is loaded.
``import voco_plugin`` must not import transformers' model code (three seconds), so it waits for it: where
that code is there already the class is registered at once, otherwise when somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from typing import Any

_TARGET = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModel`` know the open_clip tower; harmless when done twice."""
    from transformers import AutoConfig, AutoModel

    from .encoders.open_clip_model import MODEL_TYPE, OpenClipVisionConfig, OpenClipVisionModel

    AutoConfig.register(MODEL_TYPE, OpenClipVisionConfig, exist_ok=True)
    AutoModel.register(OpenClipVisionConfig, OpenClipVisionModel, exist_ok=True)


def register_when_loaded() -> None:
    """:func:`register` now if transformers' auto classes are imported, else right after they are."""
    if _TARGET in sys.modules:
        register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds the module it waits for as the other finders do, and adds a step after it has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
