"""Keys and values in 8 bits: symmetric, with a bf16 scale for each 16 channels of a head and token.

    x (T, H, D)  →  q (T, H, D) int8,  scale (T, H, ceil(D / GROUP)) bf16:   x ≈ q · scale

That is 1.125 bytes a value, whatever K is. A scale per channel over the K tokens of a block, as int8 caches
of long prompts have it, would take more than the values at K = 1. One shared by all blocks of a store takes
nothing, but clips what the first blocks did not show, and a record could not be read without its store.
Nothing is clipped here: scales are rounded up. A channel that sticks out costs precision among its 16 only.
"""

from __future__ import annotations

import torch

from .container import VoCoCacheError

GROUP = 16
SCALE_DTYPE = torch.bfloat16


def scale_shape(shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    """The shape of the scales of values of ``shape`` ``(T, H, D)``."""
    return (*shape[:-1], -(-shape[-1] // group))


def _spread(scale: torch.Tensor, group: int, channels: int) -> torch.Tensor:
    """``(T, H, G)`` → ``(T, H, D)``, fp32."""
    return scale.float()[..., torch.arange(channels) // group]


def _rounded_up(scale: torch.Tensor) -> torch.Tensor:
    """Positive fp32 as bf16, never smaller."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(SCALE_DTYPE)


def quantize(tensors: dict[str, torch.Tensor], group: int = GROUP) -> dict[str, torch.Tensor]:
    """Each tensor ``name`` ``(T, H, D)`` as ``name`` in int8 and ``name_scale``.

    Raises:
        VoCoCacheError: a value is not finite, or beyond fp32.
    """
    out = {}
    for names in _alike(tensors):
        exact = torch.stack([tensors[name] for name in names]).float()
        finite = torch.isfinite(exact).flatten(1).all(dim=1)
        if not bool(finite.all()):
            name = names[int(finite.int().argmin())]
            raise VoCoCacheError(f"{name} holds values that are not finite, which 8 bits cannot; keep them.")
        channels = exact.shape[-1]
        padded = torch.nn.functional.pad(exact, (0, -channels % group))
        largest = padded.unflatten(-1, (-1, group)).abs().amax(dim=-1)
        scale = _rounded_up((largest / 127).clamp_min(torch.finfo(torch.float32).tiny))
        values = (exact / _spread(scale, group, channels)).round().clamp(-127, 127).to(torch.int8)
        for number, name in enumerate(names):
            out[name], out[f"{name}_scale"] = values[number], scale[number]
    return out


def dequantize(tensors: dict[str, torch.Tensor], dtype: torch.dtype, group: int) -> dict[str, torch.Tensor]:
    """The reverse of :func:`quantize`, in ``dtype``."""
    out: dict[str, torch.Tensor] = {}
    for names in _alike({name: t for name, t in tensors.items() if not name.endswith("_scale")}):
        values = torch.stack([tensors[name] for name in names]).float()
        scale = torch.stack([tensors[f"{name}_scale"] for name in names])
        exact = (values * _spread(scale, group, values.shape[-1])).to(dtype)
        out |= zip(names, exact, strict=True)
    return out


def _alike(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """Names of tensors of one shape, which are worked on at once: layers differ little, and are many."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tuple(tensor.shape), []).append(name)
    return list(names.values())
