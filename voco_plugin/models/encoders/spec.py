"""``EncoderSpec``: what is known of an encoder before it is loaded, and what a name stands for."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import nearest, suggest_fields
from ...registry import encoders
from ..model_paths import looks_local

LIBRARIES: dict[str, str] = {
    "transformers": "voco_plugin.models.encoders.towers",
    "timm": "voco_plugin.models.encoders.timm_towers",
    "open_clip": "voco_plugin.models.encoders.open_clip_towers",
}
"""Where each library's loader is; it is imported when an encoder of that library is asked for."""


@suggest_fields
@dataclass(frozen=True)
class EncoderSpec:
    """An entry of ``registry.encoders``: everything that can be said of an encoder before it is loaded.

    Args:
        source: hub id or local folder; for timm and open_clip the name inside that library.
        library: ``transformers``, ``timm`` or ``open_clip``.
        licence: of the default weights, as their publisher names it; ``unknown``: see the model card.
        hidden_size: D.
        image_size: S at the default resolution, pixels.
        patch_size: pixels a side of a patch (of a cell of the last feature map for a ConvNet).
        feature_layer: which layer's features are taken by default; -1 is the last one.
        kept_prefix: prefix tokens that stay among the features when the class token is left out.
    """

    source: str
    library: str = "transformers"
    licence: str = "unknown"
    hidden_size: int | None = None
    image_size: int | None = None
    patch_size: int | None = None
    feature_layer: int | None = None
    kept_prefix: int = 0

    @property
    def num_tokens(self) -> int | None:
        """N at the default resolution, without the class token; ``None`` where only loading tells."""
        if self.image_size is None or self.patch_size is None:
            return None
        return (self.image_size // self.patch_size) ** 2 + self.kept_prefix


Loader = Callable[..., Any]
"""What a third party may register instead of a spec: ``(image_size=, feature_layer=, class_token=) ->
Encoder``."""


def is_folder(name: str) -> bool:
    """Whether ``name`` is a local checkpoint folder."""
    return (Path(name).expanduser() / "config.json").is_file()


def resolve(name: str) -> EncoderSpec | Loader:
    """What ``name`` stands for: a registered name, ``timm/<model>``, ``open_clip/<arch>[:pretrained]``, a
    local checkpoint folder, or a hub id of a transformers model. Loads no model.

    Raises:
        ValueError: nothing is called so; the nearest known name is given.
        FileNotFoundError: it looks like a local folder and is none.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"encoder={name!r} must be a name, a hub id or a checkpoint folder.")
    if name in encoders:
        return encoders.get(name)
    if is_folder(name):
        return EncoderSpec(str(Path(name).expanduser()), _library_of(Path(name).expanduser()))
    for library in ("timm", "open_clip"):
        if name.startswith(library + "/"):
            module = library_module(library)
            module.check_name(name.removeprefix(library + "/"))
            return EncoderSpec(name.removeprefix(library + "/"), library)
    if looks_local(name) or os.path.isdir(name):
        raise FileNotFoundError(f"encoder {name}: there is no config.json; give a checkpoint folder.")
    if name.count("/") == 1:
        return EncoderSpec(name)
    raise ValueError(
        f"encoder {name!r} is not known{nearest(name, encoders.list())}; give one of `voco registry "
        "encoders`, timm/<model>, open_clip/<arch>:<pretrained>, a hub id or a checkpoint folder."
    )


def _library_of(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind == "open_clip_vision":
        return "open_clip"
    return "timm" if kind == "timm_wrapper" or (kind is None and "architecture" in config) else "transformers"


def library_module(library: str) -> Any:
    """The loader module of a library, imported now."""
    if library not in LIBRARIES:
        raise ValueError(
            f"library {library!r} of an encoder is not known{nearest(library, LIBRARIES)}; "
            f"one of {', '.join(LIBRARIES)}."
        )
    return importlib.import_module(LIBRARIES[library])
