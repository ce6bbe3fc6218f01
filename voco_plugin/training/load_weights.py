"""Whole weights of a checkpoint back into a model that is being trained."""

from __future__ import annotations

import os

from torch import nn

from ..config import CONFIG_NAME, VoCoConfig
from ..core.block_embeddings import NAME
from ..models.compressor_weights import expected_by, read_compressor
from ..models.loading import trusts_code_of_others


def load_whole_weights(model: nn.Module, folder: str | os.PathLike, trust_remote_code: bool = False) -> None:
    """Copy the weights saved in ``folder`` into ``model``, every one of them.

    ``save_pretrained`` writes the names a family's older checkpoints had, and ``from_pretrained`` translates
    them; transformers' own Trainer reads the file by name instead and goes on with the weights it has, with a
    warning, where the names differ (transformers 5.23: all of LLaVA's).

    Raises:
        RuntimeError: the checkpoint is of another model.
    """
    from transformers import AutoModelForImageTextToText

    options = {"trust_remote_code": trusts_code_of_others(os.fspath(folder), trust_remote_code)}
    with expected_by(AutoModelForImageTextToText, folder, hasattr(model, NAME), **options):
        saved = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **options)
    weights = saved.state_dict()
    if hasattr(model, NAME):
        made = read_compressor(lambda name: _file(folder, name))
        weights |= {f"{NAME}.{name}": tensor for name, tensor in made.items()}
    model.load_state_dict(weights, strict=True)


_MEANING = (
    "rule", "num_tokens", "block_context", "positions", "block_sink", "hide_prefix", "token_init",
    "compressor", "compressor_options", "frozen_stage1", "adapter_stages",
)  # fmt: skip
"""What of a config decides what weights have learnt; how attention is computed, say, does not."""


def check_resumable(folder: str | os.PathLike, config: VoCoConfig | None) -> None:
    """Refuse to go on from a checkpoint that was trained as something else.

    Args:
        config: that of the run; ``None`` for one without VoCo tokens.

    Raises:
        ValueError: it names what differs.
    """
    if not os.path.isdir(folder):
        return  # which Trainer says
    saved = os.path.isfile(os.path.join(folder, CONFIG_NAME))
    if saved != (config is not None):
        was, now = ("with", "has none (voco: null)") if saved else ("without", "has them (voco: …)")
        raise ValueError(
            f"{folder} was trained {was} VoCo tokens, and this run {now}; resume with the recipe that it was "
            "made with, or start from its weights (model_name_or_path)."
        )
    if config is None:
        return
    was_dict, now_dict = VoCoConfig.load(folder)[0].to_dict(), config.to_dict()
    wrong = [f"{n}={was_dict[n]!r} (now {now_dict[n]!r})" for n in _MEANING if was_dict[n] != now_dict[n]]
    if wrong:
        raise ValueError(
            f"{folder} was trained with {', '.join(wrong)}; resume with what it was made with, or start a "
            "new run from its weights (model_name_or_path)."
        )


def _file(folder: str | os.PathLike, name: str) -> str | None:
    path = os.path.join(folder, name)
    return path if os.path.isfile(path) else None
