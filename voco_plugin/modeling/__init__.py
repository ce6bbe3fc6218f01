"""Attach the isolation rule to a model, take it off, load and save."""

from ..isolation import Attachment
from .attach import attach, attachment, detach, is_attached, unwrap
from .loading import load, save_voco_config

__all__ = [
    "Attachment",
    "attach",
    "attachment",
    "detach",
    "is_attached",
    "load",
    "save_voco_config",
    "unwrap",
]
