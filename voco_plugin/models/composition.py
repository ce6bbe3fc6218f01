"""The checks of a composition before anything is loaded: keys, names and types. Imports no torch."""

from __future__ import annotations

from typing import Any

from .encoders.spec import resolve
from .gguf import check_gguf_reader
from .llms import resolve_llm, template_text
from .projectors import check_projector

KEYS = (
    "encoder",
    "llm",
    "projector",
    "image_size",
    "feature_layer",
    "class_token",
    "chat_template",
    "pretrained",
    "seed",
)
"""The keys of a recipe's ``model`` section: the arguments of :func:`compose` but its dtype."""


def check_names(encoder: str, llm: str, projector: str = "mlp2x_gelu", **options: Any) -> None:
    """Check what can be checked before anything loads: every name, and the template.

    Raises:
        ValueError: a name is unknown (the nearest one is given), or a value has the wrong type.
    """
    resolve(encoder)
    if resolve_llm(llm).source.endswith(".gguf"):
        check_gguf_reader()
    check_projector(projector)
    if options.get("chat_template") is not None:
        template_text(options["chat_template"])
    for key, kind in (("image_size", int), ("feature_layer", int), ("seed", int)):
        value = options.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ValueError(f"{key}={value!r} must be an integer.")
    if (options.get("image_size") or 1) < 1:
        raise ValueError(f"image_size={options['image_size']} must be at least 1 pixel.")
    for key in ("class_token", "pretrained"):
        if not isinstance(options.get(key, False), bool):
            raise ValueError(f"{key}={options[key]!r} must be true or false.")
