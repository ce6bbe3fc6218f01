"""Attach the isolation rule to a model, take it off, load and save; compose a model from parts."""

from ..attached import attachment, is_attached, unwrap
from ..isolation import Attachment
from .attach import attach, detach
from .compose import compose
from .loading import load, save_voco_config

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
