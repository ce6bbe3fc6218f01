"""``merge_adapter``: an adapter and the model it was trained on, as one ordinary checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .._compat import former_names_are_fine
from ..config import CONFIG_NAME, VoCoConfig
from ..core.attachment import unwrap
from ..files import atomic_folder
from .answer_ends import answer_end, stop_at
from .loading import auto_class, find_file, load
from .model_paths import ADAPTER, base_of_adapter, check_model_path


def merge_adapter(source: str | os.PathLike, out: str | os.PathLike, *, dtype: str | None = None) -> Path:
    """Write the model that a checkpoint folder's adapter makes of its base, merged into the weights.

    The result loads without PEFT, and is what a new adapter starts from: a LoRA on a merged base is one
    adapter, where an adapter on an adapter is not to be had. With VoCo in ``source`` the result is an
    ordinary VoCo checkpoint, without it a plain VLM.

    Args:
        source: the folder of a PEFT adapter, trained with VoCo or without, or its hub id.
        out: a folder that does not exist yet; it appears when it is whole.
        dtype: of the weights; ``None``: the base's.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: ``source`` holds no adapter, or one that acts in one stage only, which merged weights
            cannot.
    """
    source, out = os.path.expanduser(os.fspath(source)), Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists; give a folder that does not.")
    check_model_path(source)
    file = find_file(source, ADAPTER)
    if file is None:
        raise ValueError(
            f"{source} holds no adapter ({ADAPTER}): it is merged already, or another folder is meant."
        )
    config = find_file(source, CONFIG_NAME)
    if config is None:
        model, processor = _plain(source, file, dtype)
    else:
        _check_stages(source, VoCoConfig.load(Path(config).parent)[0])
        model, processor = load(source, dtype=dtype)
    merged = model.merge_and_unload()
    with atomic_folder(out) as made:
        merged.save_pretrained(made)
        processor.save_pretrained(made)
    return out


def _check_stages(source: str, config: VoCoConfig) -> None:
    """Refuse an adapter that acts on some tokens only."""
    if config.frozen_stage1:
        raise ValueError(
            f"the adapter at {source} reads and does not compress (frozen_stage1): merged, it would compress "
            "too, into other blocks. Keep it an adapter."
        )
    if config.adapter_stages != "both":
        raise ValueError(
            f"the adapter at {source} acts by stage (adapter_stages={config.adapter_stages!r}): merged, it "
            "would act on every token. Keep it an adapter."
        )


def _plain(source: str, adapter_file: str, dtype: str | None) -> tuple[Any, Any]:
    """A plain VLM with the adapter that ``voco: null`` trained, and its processor."""
    from peft import PeftModel
    from transformers import AutoProcessor

    base = base_of_adapter(source, adapter_file)
    check_model_path(base, f"the base of {source},")
    options: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model = auto_class(base).from_pretrained(base, **options)
    with former_names_are_fine():
        tuned = PeftModel.from_pretrained(model, source)
    processor = AutoProcessor.from_pretrained(source)
    end = answer_end(processor, getattr(processor, "chat_template", None))
    stop_at(unwrap(tuned).generation_config, None if end is None else end.token_id)
    return tuned, processor


__all__ = ["merge_adapter"]
