"""Whether a model has the rule on, and what it was given: also through PEFT, DDP, DeepSpeed, FSDP and
``torch.compile`` wrappers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .forward import Attachment

ATTRIBUTE = "_voco_attachment"
"""Where an attached model keeps its :class:`Attachment`."""


def unwrap(model: Any) -> torch.nn.Module:
    """The transformers model inside PEFT, DDP, FSDP, DeepSpeed or ``torch.compile`` wrappers."""
    from transformers import PreTrainedModel

    seen = model
    while not isinstance(seen, PreTrainedModel):
        if isinstance(getattr(seen, "_orig_mod", None), torch.nn.Module):
            seen = seen._orig_mod
        elif hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()
        elif isinstance(getattr(seen, "module", None), torch.nn.Module):
            seen = seen.module
        else:
            break
    return seen


def is_attached(model: Any) -> bool:
    """Whether ``model`` (or the model inside its wrappers) has the rule on."""
    return getattr(unwrap(model), ATTRIBUTE, None) is not None


def attachment(model: Any) -> Attachment:
    """The :class:`Attachment` of a model, also through its wrappers.

    Raises:
        ValueError: the model is not attached.
    """
    found = getattr(unwrap(model), ATTRIBUTE, None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no VoCo attached; call voco_plugin.attach(model, config) first."
        )
    return found
