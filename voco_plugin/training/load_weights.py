"""Whole weights of a checkpoint back into a model that is being trained."""

from __future__ import annotations

import os

from torch import nn

from ..core.block_embeddings import NAME
from ..models.compressor_weights import expected_by, read_compressor


def load_whole_weights(model: nn.Module, folder: str | os.PathLike, trust_remote_code: bool = False) -> None:
    """Copy the weights saved in ``folder`` into ``model``, every one of them.

    ``save_pretrained`` writes the names a family's older checkpoints had, and ``from_pretrained`` translates
    them; transformers' own Trainer reads the file by name instead and goes on with the weights it has, with a
    warning, where the names differ (transformers 5.23: all of LLaVA's).

    Raises:
        RuntimeError: the checkpoint is of another model.
    """
    from transformers import AutoModelForImageTextToText

    options = {"trust_remote_code": trust_remote_code}
    with expected_by(AutoModelForImageTextToText, folder, hasattr(model, NAME), **options):
        saved = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **options)
    weights = saved.state_dict()
    if hasattr(model, NAME):
        made = read_compressor(lambda name: _file(folder, name))
        weights |= {f"{NAME}.{name}": tensor for name, tensor in made.items()}
    model.load_state_dict(weights, strict=True)


def _file(folder: str | os.PathLike, name: str) -> str | None:
    path = os.path.join(folder, name)
    return path if os.path.isfile(path) else None
