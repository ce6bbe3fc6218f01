"""Downsampled image: the vision tower looks at so small a picture that it gives K tokens (the "low
resolution" modes of DeepSeek-OCR and others; at K = 1 the picture is one patch).

Shapes: ``G`` blocks, ``n`` vision tokens of each at full size, ``k`` tokens, ``D`` width of the language
model, ``S`` pixels a side.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from .base import Compressor, identity_linear

_HOSTS = ("llava", "fast_vlm")
_INTERPOLATES = "interpolate_pos_encoding"


class Downsample(Compressor):
    """``Linear(features of the shrunk image)``: the model's own tower and projector, √k × √k patches."""

    reads_pixels = True

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__(width, num_tokens)
        _side(num_tokens)
        self.linear = identity_linear(width)

    def check_model(self, model: Any) -> None:
        kind = model.config.model_type
        tower = getattr(model.base_model, "vision_tower", None)
        if kind in _HOSTS and (kind != "llava" or _interpolates(tower)):
            return
        what = f"a {type(tower).__name__} in " if kind in _HOSTS else ""
        raise ValueError(
            f"compressor 'downsample' shrinks the image for the tower, and {what}a {kind} model takes images "
            "in another way or of one size only; use it with LLaVA over CLIP or SigLIP or a composed timm "
            "ConvNet, or take 'avg_pool'."
        )

    def features(self, model: Any, pixels: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """The image features of the shrunk pictures ``(G, k, D)``.

        Args:
            pixels: ``(G, C, S, S)``, as the model gets them.
            n: the vision tokens that a picture of this size has.

        Raises:
            ValueError: ``k`` or ``n`` is not a square, ``k`` is more than ``n``, or the tower gives something
                else than a token a patch.
        """
        side, whole = _side(k), math.isqrt(n)
        size = pixels.shape[-1]
        if whole * whole != n or size % whole or pixels.shape[-2] != size or k > n:
            raise ValueError(
                f"compressor 'downsample' shrinks square images of n × n patches to at most as many; {n} "
                f"vision tokens of {pixels.shape[-2]} × {size} pixels are not to be shrunk to {k}."
            )
        # normalised pixels: an affine map and a mean may change places; antialiased, so that none is lost
        small = torch.nn.functional.interpolate(
            pixels.float(),
            size=(size // whole * side,) * 2,
            mode="bilinear",
            antialias=True,
            align_corners=False,
        ).to(pixels.dtype)
        backbone = model.base_model
        more = {_INTERPOLATES: True} if _interpolates(backbone.vision_tower) else {}
        found = backbone.get_image_features(small, return_dict=True, **more).pooler_output
        found = found if isinstance(found, torch.Tensor) else torch.stack(list(found))
        if found.shape[1] != k:
            raise ValueError(
                f"compressor 'downsample': this tower gives {found.shape[1]} tokens for an image of {k} "
                "patches (a class token among them, or a grid of its own); use one with a token a patch."
            )
        return found

    def forward(self, vision, rows, question=None) -> torch.Tensor:
        return self.linear(vision)


def _side(k: int) -> int:
    side = math.isqrt(k)
    if side * side != k:
        raise ValueError(
            f"compressor 'downsample' makes a square of tokens, and num_tokens={k} is none; use "
            f"{side * side} or {(side + 1) ** 2}."
        )
    return side


def _interpolates(tower: Any) -> bool:
    """Whether the tower can be asked to interpolate its position embeddings (CLIP, SigLIP)."""
    return tower is not None and _INTERPOLATES in inspect.signature(tower.forward).parameters
