"""Weights as they ship inside the package: one safetensors file in bf16, compressed with xz.

A third of the bytes of fp32. Rounding to bf16 halves them and keeps the accuracy (docs/decisions.md); of the
half that is left, signs and exponents repeat, and xz finds them. `xz -d` gives an ordinary bf16 file.
"""

from __future__ import annotations

import lzma
import os
from pathlib import Path

from voco_plugin.files import atomic_path

# lp=1, pb=1: the numbers are two bytes long. 5 % smaller than the preset alone
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lp": 1, "pb": 1}]


def pack_weights(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Rounds a safetensors file of floating-point weights to bf16 and writes it to `target`, compressed."""
    from safetensors.torch import load_file, save

    rounded = {name: weight.bfloat16() for name, weight in load_file(source).items()}
    packed = lzma.compress(save(rounded, metadata={"format": "pt"}), filters=FILTERS)
    with atomic_path(target) as temporary:
        temporary.write_bytes(packed)


def unpack_weights(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Writes what `pack_weights` made to `target`, a safetensors file in fp32.

    Raises:
        lzma.LZMAError: `source` is damaged.
    """
    from safetensors.torch import load, save_file

    weights = load(lzma.decompress(Path(source).read_bytes()))
    with atomic_path(target) as temporary:
        save_file({name: weight.float() for name, weight in weights.items()}, temporary, {"format": "pt"})
