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
        "Attachment": "..core.attachment",
        "attach": ".attaching",
        "attachment": "..core.attachment",
        "compose": ".composing",
        "detach": ".attaching",
        "is_attached": "..core.attachment",
        "load": ".loading",
        "save_voco_config": ".loading",
        "unwrap": "..core.attachment",
    },
)

if TYPE_CHECKING:
    from ..core.attachment import Attachment, attachment, is_attached, unwrap
    from .attaching import attach, detach
    from .composing import compose
    from .loading import load, save_voco_config
