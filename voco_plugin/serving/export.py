"""``export_text_model``: a checkpoint's language model as a folder that engines load, and
``voco_engine.json``, which tells them of blocks.

    out/config.json, model.safetensors, generation_config.json      an ordinary …ForCausalLM
    out/tokenizer.json, chat_template.jinja                         its tokenizer, with the VoCo token
    out/voco_engine.json                                            whose blocks it reads, and how they move
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..cache.engine_file import EngineFile
from ..cache.fingerprint import blocks_made_by
from ..cache.place.relocation import RelocationError
from ..cache.place.written_rope import written_rope
from ..core.attachment import attachment, unwrap
from ..core.forward import as_cache
from ..core.layout import tokenizer_of
from ..files import atomic_folder
from ..models.loading import load
from ..store.keys import of_the_store
from .text_model import NotExportableError, text_model_of


def export_text_model(
    source: str | os.PathLike, out: str | os.PathLike, *, dtype: str | None = None, processor: Any = None
) -> Path:
    """Write the language model of a VoCo checkpoint for engines; whole or not at all.

    Args:
        source: a checkpoint's folder, or its hub id.
        out: a folder that does not exist yet.
        dtype: of the weights (``"float32"``, ``"bfloat16"`` …); ``None``: the checkpoint's. Blocks are read
            in it.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        NotExportableError: the language model cannot answer outside its vision-language model.
        ValueError: ``source`` is no VoCo checkpoint.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists; give a folder that does not.")
    model, loaded = load(source, dtype=dtype)
    model.eval()
    return write_text_model(model, processor or loaded, out)


def write_text_model(model: Any, processor: Any, out: str | os.PathLike) -> Path:
    """As :func:`export_text_model`, of an attached model in memory.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        NotExportableError: its language model cannot stand alone.
    """
    made = text_model_of(model)
    file = engine_file_of(model, made)
    tokenizer = tokenizer_of(processor)
    with atomic_folder(out) as folder:
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        template = getattr(processor, "chat_template", None)
        if isinstance(template, str) and not getattr(tokenizer, "chat_template", None):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        file.write(folder)
    return Path(out)


def engine_file_of(model: Any, made: PreTrainedModel) -> EngineFile:
    """What an engine has to know of the blocks of ``model`` (attached), whose language model is ``made``.

    Raises:
        NotExportableError: its keys cannot be moved by what can be written down.
    """
    inner, state = unwrap(model), attachment(model)
    keys, values = _shapes(made)
    if len(set(keys + values)) != 1:
        raise NotExportableError(
            f"the layers of {type(made).__name__} cache keys and values of different shapes "
            f"({', '.join(map(str, sorted(set(keys + values))))}: heads, width); an engine file names one."
        )
    try:
        layers = written_rope(made.base_model)
    except RelocationError as problem:
        raise NotExportableError(str(problem)) from problem
    return EngineFile(
        fingerprint=of_the_store(blocks_made_by(inner, state)),
        voco_id=state.vocab.voco_id,
        image_ids=tuple(sorted(state.vocab.placeholders | state.vocab.markers)),
        input_only=tuple(sorted({state.vocab.voco_id, *state.vocab.placeholders})),
        num_tokens=state.config.num_tokens,
        num_layers=len(keys),
        num_kv_heads=keys[0][0],
        head_dim=keys[0][1],
        dtype=str(made.dtype).removeprefix("torch."),
        positions="compact",
        max_positions=int(made.config.max_position_embeddings),
        layers=tuple(layers),
    )


@torch.no_grad()
def _shapes(made: PreTrainedModel) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    cache = DynamicCache()
    made(input_ids=torch.zeros(1, 1, dtype=torch.long, device=made.device), use_cache=True, **as_cache(cache))
    layers: list[Any] = cache.layers
    return (
        [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers],
        [(layer.values.shape[1], layer.values.shape[3]) for layer in layers],
    )


__all__ = ["engine_file_of", "export_text_model", "write_text_model"]
