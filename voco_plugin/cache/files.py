"""The file of a VoCo cache: safetensors, one key and one value tensor a layer, and JSON metadata with a
checksum.

layers.{l}.key, layers.{l}.value   (T, H, D), T = the K of all blocks together, block after block
metadata["voco"]                   JSON: format version, blocks, rows, fingerprint, sha256 of all tensor bytes
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_path
from .block import VoCoBlock

FORMAT_VERSION = 2
_BLOCK_FIELDS = ("num_tokens", "position", "extent", "num_vision", "relocatable", "order")


class VoCoCacheError(ValueError):
    """A file is not a VoCo cache this release can trust; the message says what is wrong with it."""


def _digest(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> str:
    """sha256 over the metadata and every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return sha.hexdigest()


def write_cache(path, blocks, rows, num_rows, fingerprint) -> None:
    """Write the file atomically."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    if blocks:
        layers = {b.num_layers for b in blocks}
        dtypes = {b.dtype for b in blocks}
        if len(layers) > 1 or len(dtypes) > 1:
            raise ValueError(f"blocks differ in layers {sorted(layers)} or dtype {sorted(map(str, dtypes))}.")
        for layer in range(layers.pop()):
            for name in ("key", "value"):
                parts = [getattr(b, f"{name}s")[layer].detach().cpu().transpose(0, 1) for b in blocks]
                tensors[f"layers.{layer}.{name}"] = torch.cat(parts).contiguous()
    record = {
        "format_version": FORMAT_VERSION,
        "blocks": [{f: getattr(b, f) for f in _BLOCK_FIELDS} for b in blocks],
        "rows": list(rows),
        "num_rows": num_rows,
        "fingerprint": fingerprint,
    }
    metadata = {"voco": json.dumps(record, sort_keys=True), "sha256": _digest(tensors, record)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _check_header(path: Path) -> None:
    """Lengths before memory: the header must fit the file, and the tensors must end where the file ends."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise VoCoCacheError(f"{path} is truncated: {size} bytes hold no header.")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, 100_000_000):
            raise VoCoCacheError(
                f"{path} is truncated or not a cache: its header claims {length} of {size} bytes."
            )
        try:
            header = json.loads(stream.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            metadata = header.get("__metadata__", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise VoCoCacheError(f"{path} is not a VoCo cache: its header cannot be read.") from None
        if "voco" not in metadata or "sha256" not in metadata:
            raise VoCoCacheError(
                f"{path} is a safetensors file but not a VoCo cache; write it with VoCoCache.save."
            )
        if 8 + length + max(ends, default=0) != size:
            raise VoCoCacheError(
                f"{path} is truncated or was appended to: {size} bytes where its header says "
                f"{8 + length + max(ends, default=0)}."
            )


def read_cache(path: str | os.PathLike) -> tuple[list[VoCoBlock], list[int], int, dict[str, Any]]:
    """Blocks, rows, number of rows and fingerprint of a file, after every check."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    _check_header(path)
    try:
        with safe_open(str(path), framework="pt") as stream:
            metadata = stream.metadata()
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        record = json.loads(metadata["voco"])
    except (SafetensorError, ValueError) as error:
        raise VoCoCacheError(f"{path} cannot be read ({error}).") from None
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version") if isinstance(record, dict) else None
        raise VoCoCacheError(f"{path} has format version {version}; this release reads {FORMAT_VERSION}.")
    if _digest(tensors, record) != metadata["sha256"]:
        raise VoCoCacheError(f"{path} was changed since it was written: its checksum does not match.")
    try:
        return _blocks(tensors, record)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise VoCoCacheError(f"{path}: tensors and metadata do not match ({error}).") from None


def _blocks(tensors, record) -> tuple[list[VoCoBlock], list[int], int, dict[str, Any]]:
    counts = [b["num_tokens"] for b in record["blocks"]]
    layers = len(tensors) // 2
    parts = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 3 or tensor.shape[0] != sum(counts):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {sum(counts)} tokens are described")
        parts[name] = tensor.split(counts)
    blocks = []
    for i, facts in enumerate(record["blocks"]):
        keys = tuple(parts[f"layers.{n}.key"][i].transpose(0, 1).contiguous() for n in range(layers))
        values = tuple(parts[f"layers.{n}.value"][i].transpose(0, 1).contiguous() for n in range(layers))
        blocks.append(VoCoBlock(keys, values, *(facts[f] for f in _BLOCK_FIELDS[1:])))
    return blocks, list(record["rows"]), int(record["num_rows"]), dict(record["fingerprint"])
