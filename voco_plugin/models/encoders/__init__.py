"""Image encoders by name: transformers vision towers, timm and open_clip models.

Presets are plain figures, so that listing them imports neither torch nor a library; ``timm/<model>`` and
``open_clip/<arch>[:pretrained]`` need no preset.
"""

from __future__ import annotations

import importlib
from typing import Any

from ...registry import encoders
from . import presets
from .spec import EncoderSpec, resolve

for _name, _spec in presets.PRESETS.items():
    encoders.register(_name, _spec)

__all__ = ["Encoder", "EncoderSpec", "load_encoder", "resolve"]


def __getattr__(name: str) -> Any:
    if name in ("Encoder", "load_encoder"):
        return getattr(importlib.import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
