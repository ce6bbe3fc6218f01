"""Whole weights of a checkpoint back into a model that is being trained."""

from __future__ import annotations

import os

from torch import nn


def load_whole_weights(model: nn.Module, folder: str | os.PathLike, trust_remote_code: bool = False) -> None:
    """Copy the weights saved in ``folder`` into ``model``, every one of them.

    ``save_pretrained`` writes the names a family's older checkpoints had, and ``from_pretrained`` translates
    them; transformers' own Trainer reads the file by name instead and goes on with the weights it has, with a
    warning, where the names differ (transformers 5.23: all of LLaVA's).

    Raises:
        RuntimeError: the checkpoint is of another model.
    """
    from transformers import AutoModelForImageTextToText

    saved = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code
    )
    model.load_state_dict(saved.state_dict(), strict=True)
