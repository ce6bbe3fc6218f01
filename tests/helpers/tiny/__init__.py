"""Tiny real models, their inputs and their processors: everything a test needs without a model hub."""

from .inputs import glue_ids, image_run, image_sizes, make_inputs, num_features, vision_ids
from .models import FIRST, NAMES, build, config, voco_id
from .vocab import BOS, EOS, PAD

__all__ = [
    "BOS",
    "EOS",
    "FIRST",
    "NAMES",
    "PAD",
    "build",
    "config",
    "glue_ids",
    "image_run",
    "image_sizes",
    "make_inputs",
    "num_features",
    "vision_ids",
    "voco_id",
]
