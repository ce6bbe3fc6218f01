"""PEFT for VoCo: adapters in the language model alone, one trainable token row, and small checkpoints."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.block_embeddings import NAME
from ..models.two_adapters import save_read
from .adapter_checks import check_loads_again, check_prompt_learning, check_row_is_free
from .parts import LANGUAGE, PROJECTOR, VISION, ModelParts, base_of, is_peft

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_ALL = "all-linear"


def prepare_peft_config(
    model: PreTrainedModel,
    peft_config: Any,
    token_id: int | None,
    *,
    train_projector: bool = False,
    train_vision_tower: bool = False,
    train_language: bool = True,
    train_compressor: bool = True,
    compresses: bool = True,
) -> Any:
    """A copy of ``peft_config`` that adapts the language model and trains the VoCo token's row.

    Plain names, ``"all-linear"`` and ``None`` (taken as ``"all-linear"``) in ``target_modules`` are anchored
    to the layers of the language model, so that a vision tower with layers of the same name is left alone; a
    name that only exists elsewhere, and a regular expression, are kept as they are.

    Args:
        model: the attached model, before PEFT.
        token_id: the VoCo token; ``None`` trains no row.
        train_projector: train a copy of the projector's modules; its loose parameters are not PEFT's (see
            :func:`train_loose_parameters`).
        train_vision_tower: adapt the vision tower's layers of the same names too.
        train_language: adapt the language model's layers.
        compresses: whether there are VoCo tokens; tokens that a PEFT method puts first would shift them.
        train_compressor: train the compressor, where the VoCo tokens' embeddings are made by one.

    Raises:
        ValueError: the PEFT method puts tokens of its own into the sequence, or cannot train what is asked;
            or nothing is left to adapt.
    """
    config = copy.deepcopy(peft_config)
    method = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        check_prompt_learning(config, compresses, train_projector or train_vision_tower)
        return config
    check_loads_again(config)
    parts = ModelParts(model)
    if method == "TRAINABLE_TOKENS":
        if train_projector or train_vision_tower:
            raise ValueError(
                "PEFT method TRAINABLE_TOKENS trains token rows alone, and train_projector or "
                "train_vision_tower is true; use LoRA, or no PEFT with train_language=False."
            )
        if token_id is not None and token_id not in config.token_indices:
            config.token_indices = [*config.token_indices, token_id]
        return config
    targets = getattr(config, "target_modules", None)
    plain = not isinstance(targets, str) or targets.lower() == _ALL
    if plain and getattr(config, "target_parameters", None) is None:
        layers = getattr(config, "layers_to_transform", None)
        config.target_modules = anchored(model, parts, targets, layers, train_vision_tower, train_language)
        if layers is not None:  # the pattern says it now; PEFT refuses both together
            config.layers_to_transform = config.layers_pattern = None
    elif isinstance(targets, str) and not train_language:
        _refuse_language(model, parts, targets)
    compressor = getattr(model, NAME, None)
    if train_compressor and compressor is not None and any(True for _ in compressor.parameters()):
        config.modules_to_save = [*(config.modules_to_save or []), NAME]
    if train_projector:
        config.modules_to_save = [*(config.modules_to_save or []), *parts.wrappable(model, PROJECTOR)]
    if token_id is not None:
        if not hasattr(config, "trainable_token_indices"):
            raise ValueError(f"PEFT method {method} cannot train the VoCo token's row alone; use LoRA.")
        check_row_is_free(model, config)
        config.trainable_token_indices = with_token(model, config.trainable_token_indices, token_id)
    return config


def _refuse_language(model: PreTrainedModel, parts: ModelParts, pattern: str) -> None:
    """A regular expression is kept as it is, so it must not reach what is to stay frozen."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and parts.of(name) == LANGUAGE and re.fullmatch(pattern, name):
            raise ValueError(
                f"train_language is false, and target_modules={pattern!r} adapts {name}; change the pattern, "
                "or leave train_language true."
            )


def with_token(model: PreTrainedModel, given: Any, token_id: int) -> Any:
    """``trainable_token_indices`` that hold the VoCo token among whatever the user gave."""
    if isinstance(given, dict):
        embeddings = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        key = next((k for k in given if embeddings == k or embeddings.endswith("." + k)), embeddings)
        return {**given, key: with_token(model, given.get(key), token_id)}
    return list(dict.fromkeys([*(given or []), token_id]))


def anchored(
    model: nn.Module,
    parts: ModelParts,
    targets: Iterable[str] | str | None,
    layers: Any,
    vision: bool,
    language: bool = True,
) -> str:
    """``target_modules`` as a regular expression over full module names."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    where = re.escape(parts.layers)
    if layers is not None:
        numbers = [layers] if isinstance(layers, int) else list(layers)
        where += rf"\.(?:{'|'.join(str(int(number)) for number in numbers)})"
    frozen = [] if language else [name for name in names if name.startswith(parts.layers + ".")]
    places = [where] if language else []
    inside = [name for name in names if name.startswith(parts.layers + ".")] if language else []
    if vision:
        places += [re.escape(root) for root in parts.roots(model, VISION)]
        inside += [name for name in names if parts.of(name) == VISION]
    if targets is None or isinstance(targets, str):
        linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        wanted = {name.rpartition(".")[2] for name in inside if name in linear}
        elsewhere: set[str] = set()
    else:
        wanted = {t for t in targets if any(name == t or name.endswith("." + t) for name in inside)}
        # a name that stands in a frozen language model only is left out, not looked for elsewhere
        elsewhere = {t for t in set(targets) - wanted if not any(n.endswith("." + t) for n in frozen)}
    if not vision:
        _refuse_vision_only(model, parts, elsewhere, names)
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
    if not patterns:
        raise ValueError(
            f"nothing is left to adapt: target_modules={targets!r}, train_language={language}, "
            f"train_vision_tower={vision}; train the projector and the VoCo row without PEFT (use_peft: "
            "false), or let one of the parts train."
        )
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _refuse_vision_only(
    model: nn.Module, parts: ModelParts, targets: Iterable[str], names: list[str]
) -> None:
    """A layer's name that only the frozen vision tower has is a mistake: the language model's is another."""
    for target in sorted(targets):
        found = [n for n in names if n == target or n.endswith("." + target)]
        if found and all(parts.of(name) == VISION for name in found):
            linear = {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and name.startswith(parts.layers + ".")
            }
            raise ValueError(
                f"target_modules: {target!r} is a layer of the vision tower only, which stays frozen; the "
                f"language model has {', '.join(sorted(linear))} (or set train_vision_tower)."
            )


def train_loose_parameters(model: PeftModel, train_projector: bool) -> list[str]:
    """Let the projector's loose parameters train where the projector does, which PEFT cannot.

    PEFT trains copies of whole modules; ``image_newline`` of LLaVA-NeXT and -OneVision is a parameter of none
    but the backbone. It trains in place: with the adapter switched off it stays as trained.

    Returns:
        their names, as :func:`save_loose_parameters` wants them.
    """
    base = base_of(model)
    parts = ModelParts(base)
    names = parts.loose(base, PROJECTOR)
    names = [n for n in names if not any(_own(part) for part in n.split("."))]
    whole = train_projector or any(
        "modules_to_save" in name and parameter.requires_grad and parts.of(name) == PROJECTOR
        for name, parameter in base.named_parameters()
    )
    if not whole:
        return []
    for name in names:
        base.get_parameter(name).requires_grad_(True)
    return names


def _own(part: str) -> bool:
    """Whether a piece of a parameter's name was put there by PEFT."""
    return part.startswith(("lora_", "trainable_tokens_", "modules_to_save", "original_module"))


def save_loose_parameters(
    model: PeftModel, names: Iterable[str], folder: str | os.PathLike, state_dict: dict[str, Any] | None
) -> None:
    """Add parameters to the adapter's file, under the names by which PEFT puts them back itself.

    Plain ``PeftModel.from_pretrained`` and resuming load them with the rest of the file.

    Args:
        names: of parameters of the model inside PEFT.
        state_dict: the gathered weights, where the model's own are sharded.
    """
    names = list(names)
    path = Path(folder) / "adapter_model.safetensors"
    if not names or not path.is_file():
        return
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    prefix = "base_model.model."
    for name in names:
        found = (state_dict or {}).get(prefix + name)
        found = base_of(model).get_parameter(name) if found is None else found
        weights[prefix + name] = found.detach().cpu().contiguous().clone()
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial, metadata=metadata or {"format": "pt"})
    os.replace(partial, path)


@contextlib.contextmanager
def small_checkpoints(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside the block, ``model.save_pretrained`` writes token rows, not embeddings, and an adapter into the
    folder itself, whatever its name (of two that act by stage, the first).

    PEFT's own rule saves both whole embeddings of a vocabulary that differs from the base model's on disk.
    The rows that :func:`~voco_plugin.attach` adds are made again from the base model when the checkpoint is
    loaded, and the trained one is in the adapter. And it writes an adapter that is not called ``default``
    into a folder of that name, below the one that is to load by its path.
    """
    if not is_peft(model):
        yield
        return
    name, *more = model.peft_config  # `check_adapter` refuses several, but those that act by stage
    rows = getattr(model.peft_config[name], "trainable_token_indices", None) is not None
    save: Any = model.save_pretrained
    if rows:
        save = functools.partial(save, save_embedding_layers=False)

    def save_here(folder: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        if more:
            kwargs["selected_adapters"] = [name]
            if kwargs.get("is_main_process", True):
                save_read(model, folder, kwargs.get("state_dict"))
        save(folder, *args, **kwargs)
        below = Path(folder) / name
        if name != "default" and below.is_dir():
            for file in sorted(below.iterdir()):
                os.replace(file, Path(folder) / file.name)
            below.rmdir()

    # on the instance, for this one save; `del` brings the class's method back
    model.save_pretrained = save_here  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.save_pretrained
