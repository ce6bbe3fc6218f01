"""What a model is made of, and how it gets the rule: families, encoders, LLMs, projectors, compressors;
attach, detach, load, compose; checkpoints of the original code (``official``).

The names below load when first used: asking what a name stands for (``composition``) needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import lazy_names

__all__ = [
    "Attachment",
    "attach",
    "attachment",
    "compose",
    "detach",
    "is_attached",
    "load",
    "save_voco_config",
    "unwrap",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Attachment": "..core.forward",
        "attach": ".attaching",
        "attachment": "..core.attached",
        "compose": ".composing",
        "detach": ".attaching",
        "is_attached": "..core.attached",
        "load": ".loading",
        "save_voco_config": ".loading",
        "unwrap": "..core.attached",
    },
)

if TYPE_CHECKING:
    from ..core.attached import attachment, is_attached, unwrap
    from ..core.forward import Attachment
    from .attaching import attach, detach
    from .composing import compose
    from .loading import load, save_voco_config
