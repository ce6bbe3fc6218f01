"""Tensor names of LLaVA's own code → those of transformers' LLaVA, and the shards that hold them.

    LLaVA                                           transformers
    model.embed_tokens · model.layers · model.norm  language_model.model.…
    lm_head                                         language_model.lm_head
    model.mm_projector.0 / .2   (mlp2x_gelu)        multi_modal_projector.linear_1 / .linear_2
    model.mm_projector          (linear)            multi_modal_projector.linear_1, and .linear_2 = identity
    model.vision_tower.vision_tower.vision_model    vision_tower.vision_model

The names written are those of the published ``llava-hf`` checkpoints, which every release of transformers
that has the class reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Entry, Reader

EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_PROJECTOR, _TOWER = "multi_modal_projector.", "vision_tower.vision_model."
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
"""Buffers that old releases saved and every model computes for itself."""
_OTHER_HALF = re.compile(r"^(text_model\.|text_projection|visual_projection|logit_scale|text_embed)")
"""What a whole CLIP has besides its vision tower."""


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its shape and type, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def llava_name(name: str, linear: bool) -> str | None:
    """The name in transformers' LLaVA of ``name`` in the original code; ``None`` where it has none.

    Args:
        linear: whether the projector is one linear layer.
    """
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    short = name.removeprefix("model.")
    if short.startswith("mm_projector."):
        layers = {"": "linear_1", "0.": "linear_1"} if linear else {"0.": "linear_1", "2.": "linear_2"}
        found = re.fullmatch(r"mm_projector\.((?:\d+\.)?)(.*)", short)
        assert found is not None  # both groups may be empty
        number, leaf = found.groups()
        return f"{_PROJECTOR}{layers[number]}.{leaf}" if number in layers else None
    if short.startswith("vision_tower.vision_tower."):
        return tower_name(short.removeprefix("vision_tower.vision_tower."))
    if re.match(r"model\.(embed_tokens|layers|norm)\.", name):
        return f"language_model.{name}"
    return None


def original_name(name: str, linear: bool) -> str:
    """What the original code calls the tensor ``name``."""
    if name.startswith(_TOWER):
        return "model.vision_tower." + name
    layers = {"linear_1.": "" if linear else "0.", "linear_2.": "2."}
    for layer, number in layers.items():
        name = name.replace(_PROJECTOR + layer, f"model.mm_projector.{number}")
    return name.removeprefix("language_model.")


def tower_name(name: str) -> str:
    """The name in transformers' LLaVA of a tensor of a CLIP checkpoint, vision tower alone or whole."""
    return _TOWER + name.removeprefix("vision_model.")


def rename(entries: dict[str, Entry], to: Callable[[str], str | None]) -> tuple[dict[str, Entry], list[str]]:
    """``entries`` under their new names, and the names that have none; derived buffers are left out."""
    renamed: dict[str, Entry] = {}
    unknown = []
    for name, entry in entries.items():
        if _DERIVED.search(name):
            continue
        new = to(name)
        if new is None:
            unknown.append(name)
        elif new in renamed:
            raise ValueError(f"{renamed[new].name} and {name} would both become {new}.")
        else:
            renamed[new] = entry
    return renamed, unknown


def tower_entries(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The vision tower's part of a CLIP checkpoint, under transformers' LLaVA names."""
    return rename({n: e for n, e in entries.items() if not _OTHER_HALF.match(n)}, tower_name)[0]


def has_tower(entries: dict[str, Entry]) -> bool:
    """Whether any of ``entries`` (new names) belongs to the vision tower."""
    return any(name.startswith(_TOWER) for name in entries)


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name as written → shape of every tensor of a ``LlavaForConditionalGeneration`` of ``config``."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    tied = config.tie_word_embeddings
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            if tied:
                continue
            name = HEAD
        elif name.startswith("model.language_model."):
            name = "language_model.model." + name.removeprefix("model.language_model.")
        elif name.startswith("model.vision_tower."):
            name = tower_name(name.removeprefix("model.vision_tower."))
        else:
            name = name.removeprefix("model.")
        if not _DERIVED.search(name):
            shapes[name] = tuple(tensor.shape)
    return shapes


def check(
    found: dict[str, Entry], wanted: dict[str, tuple[int, ...]], unknown: list[str], source: Any, linear: bool
) -> None:
    """Raise ``ValueError`` naming, as the original code does, what is missing, unexpected or mis-shaped."""
    wrong = [
        f"{found[n].name} has shape {found[n].shape}, not {wanted[n]}"
        for n in wanted
        if n in found and found[n].shape != wanted[n]
    ]
    problems = (
        ("missing", sorted(original_name(n, linear) for n in wanted if n not in found)),
        ("unexpected", sorted([*unknown, *(e.name for n, e in found.items() if n not in wanted)])),
        ("of another shape than config.json says", wrong),
    )
    if any(names for _, names in problems):
        told = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems if names)
        raise ValueError(f"the weights of {source} do not fit its config.json: {told}.")


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def pieces(
    entries: dict[str, Entry], reader: Reader, dtype: torch.dtype, rows: int, identity: int | None
) -> dict[str, Piece]:
    """What to write, in the order in which it is read.

    Args:
        dtype: of every floating-point tensor written.
        rows: rows of the embeddings and the LM head afterwards; new ones get the mean of those there are,
            whose logit is the mean of all logits and so never the largest.
        identity: where the projector is one linear layer, its width: the second layer is an identity.
    """
    out: dict[str, Piece] = {}
    for name, entry in entries.items():
        new = dtype if entry.dtype.is_floating_point else entry.dtype
        shape = (rows, *entry.shape[1:]) if name in (EMBEDDINGS, HEAD) else entry.shape

        def make(
            entry: Entry = entry, new: torch.dtype = new, shape: tuple[int, ...] = shape
        ) -> torch.Tensor:
            return _grown(reader.read(entry), shape[0] if shape else 0).to(new).contiguous()

        out[name] = Piece(shape, new, make)
    if identity is not None:
        width = identity
        out[f"{_PROJECTOR}linear_2.weight"] = Piece(
            (width, width), dtype, lambda: torch.eye(width, dtype=dtype)
        )
        out[f"{_PROJECTOR}linear_2.bias"] = Piece((width,), dtype, lambda: torch.zeros(width, dtype=dtype))
    return out


def _grown(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    if tensor.dim() == 0 or tensor.shape[0] >= rows:
        return tensor
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - tensor.shape[0], -1)])


def write_shards(
    out: dict[str, Piece], folder: Path, max_shard_size: str, tick: Callable[[str], Any] | None = None
) -> list[str]:
    """Write ``out`` as safetensors, with an index where there are several; at most one shard is in memory.

    Args:
        max_shard_size: such as ``"5GB"``.
        tick: called with the name of each file written.

    Returns:
        the names of the files.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    shapes = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in out.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: out[name].make() for name in names}, folder / file, metadata={"format": "pt"})
        if tick is not None:
            tick(file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return list(plan.filename_to_tensors)
