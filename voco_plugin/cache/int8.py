"""Keys and values in 8 bits: symmetric, with one fp32 scale for each group of channels of a head and token.

    x (T, H, D)  →  q (T, H, D) int8,  scale (T, H, ceil(D / GROUP)) fp32:   x ≈ q · scale

A scale per channel over the K tokens of a block, as int8 KV caches of long prompts have it, would be as large
as the values where K is 1. Groups of channels cost 4 bytes a group whatever K is, and an outlying channel
costs precision in its own group only.
"""

from __future__ import annotations

import torch

from .container import VoCoCacheError

GROUP = 32


def scale_shape(shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    """The shape of the scales of values of ``shape`` ``(T, H, D)``."""
    return (*shape[:-1], -(-shape[-1] // group))


def _spread(scale: torch.Tensor, group: int, channels: int) -> torch.Tensor:
    """``(T, H, G)`` → ``(T, H, D)``."""
    return scale[..., torch.arange(channels) // group]


def quantize(tensors: dict[str, torch.Tensor], group: int = GROUP) -> dict[str, torch.Tensor]:
    """Each tensor ``name`` ``(T, H, D)`` as ``name`` in int8 and ``name_scale``.

    Raises:
        VoCoCacheError: a value is not finite.
    """
    out = {}
    for name, tensor in tensors.items():
        exact = tensor.float()
        if not bool(torch.isfinite(exact).all()):
            raise VoCoCacheError(f"{name} holds values that are not finite, which 8 bits cannot; keep them.")
        channels = exact.shape[-1]
        padded = torch.nn.functional.pad(exact, (0, -channels % group))
        largest = padded.unflatten(-1, (-1, group)).abs().amax(dim=-1)
        scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
        out[name] = (exact / _spread(scale, group, channels)).round().clamp(-127, 127).to(torch.int8)
        out[f"{name}_scale"] = scale
    return out


def dequantize(tensors: dict[str, torch.Tensor], dtype: torch.dtype, group: int) -> dict[str, torch.Tensor]:
    """The reverse of :func:`quantize`, in ``dtype``."""
    out = {}
    for name, tensor in tensors.items():
        if not name.endswith("_scale"):
            scale = _spread(tensors[f"{name}_scale"], group, tensor.shape[-1])
            out[name] = (tensor.float() * scale).to(dtype)
    return out
