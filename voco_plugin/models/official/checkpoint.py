"""The weight files of a checkpoint folder: which tensor is where, and one tensor at a time.

Pickles (``.bin``) are read only by torch's restricted unpickler, and mapped into memory where their format
allows it, so that no file is ever held whole.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SAFE_INDEX, SAFE_SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
PROJECTOR = "mm_projector.bin"


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: where it is, and what is known of it without reading it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights, in order; empty where the folder has none.

    safetensors go before pickles, as transformers has it; files an index does not name are not read.

    Raises:
        FileNotFoundError: the index names a file that is not there.
    """
    for index, single, pattern in (
        (SAFE_INDEX, SAFE_SINGLE, "model-*.safetensors"),
        (BIN_INDEX, BIN_SINGLE, "pytorch_model-*.bin"),
    ):
        if (folder / index).is_file():
            try:
                names = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{folder / index} is no index of weights ({error!r}).") from None
            found = [folder / name for name in sorted(set(names))]
            missing = [path.name for path in found if not path.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder / index} names {', '.join(missing)}, which the folder does not hold; fetch "
                    "the checkpoint again."
                )
            return found
        if (folder / single).is_file():
            return [folder / single]
        if found := sorted(folder.glob(pattern)):
            return found
    return []


class Reader:
    """Tensors out of weight files, with one file open at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: Any = None

    def entries(self, files: list[Path]) -> dict[str, Entry]:
        """Every tensor of ``files``, in their order.

        Raises:
            ValueError: a file is not a checkpoint of plain tensors, or two files hold the same name.
        """
        found: dict[str, Entry] = {}
        for file in files:
            self._open(file)
            for name in self._tensors.keys():  # noqa: SIM118 - safetensors' handle is not a mapping
                if name in found:
                    raise ValueError(f"{name} is in {found[name].file.name} and again in {file.name}.")
                if file.suffix == ".safetensors":
                    piece = self._tensors.get_slice(name)
                    dtype = self._tensors.get_tensor(name).dtype if not piece.get_shape() else piece[:0].dtype
                    found[name] = Entry(file, name, tuple(piece.get_shape()), dtype)
                else:
                    tensor = self._tensors[name]
                    found[name] = Entry(file, name, tuple(tensor.shape), tensor.dtype)
        return found

    def read(self, entry: Entry) -> torch.Tensor:
        """The tensor of ``entry``."""
        self._open(entry.file)
        if entry.file.suffix == ".safetensors":
            return self._tensors.get_tensor(entry.name)
        return self._tensors[entry.name].detach()

    def _open(self, file: Path) -> None:
        if file == self._path:
            return
        self._tensors = None  # let go of the last one first
        self._tensors = _open_safe(file) if file.suffix == ".safetensors" else _open_pickle(file)
        self._path = file


def _open_safe(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or is cut short ({error}).") from None


def _open_pickle(file: Path) -> dict[str, torch.Tensor]:
    # files from before torch 1.6 are not zip archives: they cannot be mapped, and are read whole
    try:
        with open(file, "rb") as stream:
            zipped = stream.read(2) == b"PK"
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} is not read: it is cut short, or holds more than tensors, which could run code "
            f"({reason[:160]})."
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} is no state dict: it must map names to tensors.")
    return tensors
