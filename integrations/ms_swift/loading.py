"""Models that ms-swift loads get the rule."""

from __future__ import annotations

import functools
from typing import Any

import voco_plugin as vp

from .settings import TEMPLATE, config_for

VOCO = "voco_config"
"""The attribute of ms-swift's ``model_info`` that holds the config in force."""


def register_loaders() -> None:
    """Let every vision-language model that ms-swift knows be loaded under the rule, with the template that
    goes with it.
    """
    from swift.model import MODEL_MAPPING

    for meta in MODEL_MAPPING.values():
        if meta.is_multimodal:
            meta.loader = with_rule(meta.loader)
            meta.template = TEMPLATE


@functools.cache
def with_rule(loader: type) -> type:
    """ms-swift's ``loader``, a class, whose models are attached."""
    if hasattr(loader, "load_plain"):
        return loader

    class UnderTheRule(loader):  # type: ignore[misc, valid-type]
        load_plain = loader.load  # type: ignore[attr-defined]

        def load(self) -> tuple[Any, Any]:
            model, processor = self.load_plain()
            if model is not None and not self.return_dummy_model:
                vp.attach(model, config_for(self.model_info.model_dir), processor=processor)
                setattr(self.model_info, VOCO, vp.attachment(model).config)
            return model, processor

    UnderTheRule.__name__ = UnderTheRule.__qualname__ = loader.__name__
    return UnderTheRule
