"""PEFT for VoCo: adapters in the language model alone, one trainable token row, and small checkpoints."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .parts import PROJECTOR, VISION, ModelParts

_ALL = "all-linear"


def prepare_peft_config(
    model: nn.Module,
    peft_config: Any,
    token_id: int | None,
    *,
    train_projector: bool = False,
    train_vision_tower: bool = False,
) -> Any:
    """A copy of ``peft_config`` that adapts the language model and trains the VoCo token's row.

    Plain names, ``"all-linear"`` and ``None`` (taken as ``"all-linear"``) in ``target_modules`` are anchored
    to the layers of the language model, so that a vision tower with layers of the same name is left alone; a
    name that only exists elsewhere, and a regular expression, are kept as they are.

    Args:
        model: the attached model, before PEFT.
        token_id: the VoCo token; ``None`` trains no row.

    Raises:
        ValueError: the PEFT method puts tokens of its own into the sequence, or cannot train single rows.
    """
    config = copy.deepcopy(peft_config)
    method = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise ValueError(
            f"PEFT method {method} puts its own tokens before the sequence, which shifts the blocks; use "
            "LoRA."
        )
    parts = ModelParts(model)
    if method == "TRAINABLE_TOKENS":
        if token_id is not None and token_id not in config.token_indices:
            config.token_indices = [*config.token_indices, token_id]
        return config
    targets = getattr(config, "target_modules", None)
    plain = not isinstance(targets, str) or targets.lower() == _ALL
    if plain and getattr(config, "target_parameters", None) is None:
        layers = getattr(config, "layers_to_transform", None)
        config.target_modules = anchored(model, parts, targets, layers, train_vision_tower)
        if layers is not None:  # the pattern says it now; PEFT refuses both together
            config.layers_to_transform = config.layers_pattern = None
    if train_projector:
        config.modules_to_save = [*(config.modules_to_save or []), *parts.roots(model, PROJECTOR)]
    if token_id is not None:
        if not hasattr(config, "trainable_token_indices"):
            raise ValueError(f"PEFT method {method} cannot train the VoCo token's row alone; use LoRA.")
        config.trainable_token_indices = _with_token(model, config.trainable_token_indices, token_id)
    return config


def _with_token(model: nn.Module, given: Any, token_id: int) -> Any:
    """``trainable_token_indices`` that hold the VoCo token among whatever the user gave."""
    if isinstance(given, dict):
        embeddings = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        key = next((k for k in given if embeddings == k or embeddings.endswith("." + k)), embeddings)
        return {**given, key: _with_token(model, given.get(key), token_id)}
    return list(dict.fromkeys([*(given or []), token_id]))


def anchored(
    model: nn.Module, parts: ModelParts, targets: Iterable[str] | str | None, layers: Any, vision: bool
) -> str:
    """``target_modules`` as a regular expression over full module names."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    where = re.escape(parts.layers)
    if layers is not None:
        numbers = [layers] if isinstance(layers, int) else list(layers)
        where += rf"\.(?:{'|'.join(str(int(number)) for number in numbers)})"
    places = [where]
    inside = [name for name in names if name.startswith(parts.layers + ".")]
    if vision:
        places += [re.escape(root) for root in parts.roots(model, VISION)]
        inside += [name for name in names if parts.of(name) == VISION]
    if targets is None or isinstance(targets, str):
        linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        wanted = {name.rpartition(".")[2] for name in inside if name in linear}
        elsewhere: set[str] = set()
    else:
        wanted = {t for t in targets if any(name == t or name.endswith("." + t) for name in inside)}
        elsewhere = set(targets) - wanted
    patterns = []
    if wanted:
        # a target given by its full name is found where it stands
        full = sorted(t for t in wanted if t in names)
        short = sorted(wanted - set(full))
        patterns += [re.escape(name) for name in full]
        if short:
            choice = "|".join(re.escape(name) for name in short)
            patterns.append(rf"(?:{'|'.join(places)})\.(?:.*\.)?(?:{choice})")
    patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(elsewhere)]
    return "|".join(f"(?:{pattern})" for pattern in patterns)


@contextlib.contextmanager
def small_checkpoints(model: nn.Module) -> Iterator[None]:
    """Inside the block, ``model.save_pretrained`` writes token rows, not embeddings.

    PEFT's own rule saves both whole embeddings of a vocabulary that differs from the base model's on disk.
    The rows that :func:`~voco_plugin.attach` adds are made again from the base model when the checkpoint is
    loaded, and the trained one is in the adapter.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if getattr(config, "trainable_token_indices", None) is None:
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        del model.save_pretrained
