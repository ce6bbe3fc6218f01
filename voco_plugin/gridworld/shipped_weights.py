"""Weights as they ship inside the package: one safetensors file in bf16 or int8, compressed with xz.

A third of the bytes of fp32 in bf16: rounding halves them and keeps the accuracy (docs/decisions.md); of the
half that is left, signs and exponents repeat, and xz finds them. `xz -d` gives an ordinary bf16 file.

In int8 a matrix (or a convolution's kernel) `NAME` is whole numbers, and `NAME.scale` what they are
multiplied by, along the one of its first two sides that has fewer entries; what is small or no matrix stays
as it was.
"""

from __future__ import annotations

import lzma
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from voco_plugin.files import atomic_path

if TYPE_CHECKING:
    import torch

# lp=1, pb=1: the numbers are two bytes long. 5 % smaller than the preset alone
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lp": 1, "pb": 1}]
FILTERS_INT8 = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
SCALE = ".scale"
# of entries: a smaller tensor is not worth its rounding
_SMALL = 4096


def pack_weights(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Rounds a safetensors file of floating-point weights to bf16 and writes it to `target`, compressed."""
    from safetensors.torch import load_file, save

    rounded = {name: weight.bfloat16() for name, weight in load_file(source).items()}
    packed = lzma.compress(save(rounded, metadata={"format": "pt"}), filters=FILTERS)
    with atomic_path(target) as temporary:
        temporary.write_bytes(packed)


def pack_weights_int8(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Rounds the matrices of a safetensors file to int8 and writes it to `target`, compressed."""
    import torch
    from safetensors.torch import load_file, save

    rounded: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source).items():
        if weight.ndim < 2 or weight.numel() < _SMALL or not weight.is_floating_point():
            rounded[name] = weight
            continue
        side = 0 if weight.shape[0] <= weight.shape[1] or weight.ndim > 2 else 1
        others = [d for d in range(weight.ndim) if d != side]
        scale = weight.float().abs().amax(dim=others, keepdim=True).clamp_min(1e-12) / 127
        rounded[name] = (weight.float() / scale).round().to(torch.int8)
        rounded[name + SCALE] = scale
    packed = lzma.compress(save(rounded, metadata={"format": "pt"}), filters=FILTERS_INT8)
    with atomic_path(target) as temporary:
        temporary.write_bytes(packed)


def unpack_weights(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Writes what `pack_weights` or `pack_weights_int8` made to `target`, a safetensors file in fp32.

    Raises:
        lzma.LZMAError: `source` is damaged.
    """
    from safetensors.torch import load, save_file

    weights = load(lzma.decompress(Path(source).read_bytes()))
    restored = {
        name: _restored(weight, weights.get(name + SCALE))
        for name, weight in weights.items()
        if not name.endswith(SCALE)
    }
    with atomic_path(target) as temporary:
        save_file(restored, temporary, {"format": "pt"})


def _restored(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is not None:
        return weight.float() * scale
    return weight.float() if weight.is_floating_point() else weight


def unpack_folder(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies a shipped folder to `target`, unpacked what is packed (`….xz`): an ordinary checkpoint."""
    Path(target).mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(source).iterdir()):
        if file.name.endswith(".safetensors.xz"):
            unpack_weights(file, Path(target) / file.stem)
        elif file.suffix == ".xz":
            (Path(target) / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
        elif file.is_file():
            shutil.copyfile(file, Path(target) / file.name)
