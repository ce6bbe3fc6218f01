"""Counting tokens without decoding images: placeholders of the images' sizes, and a processor that remembers.

How many tokens a processor writes for an image depends on the image's size alone (and on which images share
its conversation). So its outputs for a placeholder are remembered by size, without the pixels.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.images import image_size


def placeholder_image(source: Any, where: str | None = None) -> Image.Image:
    """A black RGB image of the size of ``source``, of which only the head is read.

    Raises:
        BadImageError: its size cannot be read.
    """
    return Image.new("RGB", image_size(source, where))


def counting_processor(processor: Any) -> Any:
    """A copy of ``processor`` whose image processor runs once for each combination of image sizes."""
    made = copy.copy(processor)
    if getattr(processor, "image_processor", None) is not None:
        made.image_processor = _OutputsBySize(processor.image_processor)
    return made


class _OutputsBySize:
    """An image processor's outputs by the sizes of its inputs; pixels are zeros that take no memory."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._known: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real, name)

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        key = (_sizes(images), repr(args), repr(sorted(kwargs.items())))
        if key not in self._known:
            found = self._real(images, *args, **kwargs)
            for name, value in found.items():
                found[name] = _without_values(value) if name.startswith("pixel_values") else value
            self._known[key] = found
        known = self._known[key]
        given = copy.copy(known)  # processors take entries out of what they are given
        given.data = dict(known.data)
        return given


def _sizes(images: Any) -> Any:
    if isinstance(images, (list, tuple)):
        return tuple(_sizes(image) for image in images)
    return getattr(images, "size", None) if isinstance(images, Image.Image) else np.shape(images)


def _without_values(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, np.ndarray):
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return [_without_values(item) for item in value] if isinstance(value, (list, tuple)) else value
