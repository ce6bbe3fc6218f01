"""``voco_engine.json``: what an engine has to know of VoCo blocks to read them beside an exported
language model (`voco export`), without the vision-language model.

Needs torch and this room alone, so that an engine's own environment need not hold the rest.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_write_text
from .container import VoCoCacheError
from .place.rope_layout import complex_pairs, halves

NAME = "voco_engine.json"
VERSION = 1
_TURNS = {"halves": halves, "pairs": complex_pairs}


@dataclass(frozen=True)
class LayerRope:
    """How the cached keys of a layer turn with position.

    Attributes:
        kind: ``"halves"`` (channel i pairs with i + R/2), ``"pairs"`` (2i with 2i + 1) or ``"none"``.
        inv_freq: the R/2 angles, in radians, by which the pairs turn from one position to the next.
    """

    kind: str
    inv_freq: tuple[float, ...] = ()

    def move(self, keys: torch.Tensor, delta: int) -> torch.Tensor:
        """Keys ``(H, K, D)`` turned by ``delta`` positions, in fp32 (fp64 for fp64 keys)."""
        if self.kind == "none" or delta == 0:
            return keys
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        angles = torch.tensor(self.inv_freq, dtype=wide, device=keys.device) * delta
        cos, sin = angles.cos()[None, None], angles.sin()[None, None]  # (1, 1, R/2)
        if self.kind == "halves":
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return _TURNS[self.kind](keys.to(wide)[None], cos, sin)[0].to(keys.dtype)


@dataclass(frozen=True)
class EngineFile:
    """What stands in ``voco_engine.json``.

    Attributes:
        fingerprint: what made the blocks that this language model reads: a store's must be the same.
        voco_id: the id of the VoCo token.
        image_ids: ids that stand for vision tokens, of which no prompt of a stream holds one.
        input_only: ids that no answer to an image holds: the VoCo token and those that features replace.
        num_tokens: K where none is named.
        num_layers, num_kv_heads, head_dim: the shape of a block: per layer ``(num_kv_heads, K, head_dim)``.
        dtype: that the language model was exported in.
        positions: ``"compact"``: a block stands at its VoCo tokens' places in the stream.
        max_positions: tokens of a prompt and its answer, at most.
        layers: per layer how its keys turn.
    """

    fingerprint: dict[str, Any]
    voco_id: int
    image_ids: tuple[int, ...]
    input_only: tuple[int, ...]
    num_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    positions: str
    max_positions: int
    layers: tuple[LayerRope, ...]

    def move(self, keys: Sequence[torch.Tensor], delta: int) -> list[torch.Tensor]:
        """A block's keys, per layer ``(H, K, D)``, turned by ``delta`` positions."""
        return [rope.move(layer, delta) for rope, layer in zip(self.layers, keys, strict=True)]

    def write(self, folder: str | os.PathLike) -> Path:
        """Write ``voco_engine.json`` into ``folder``; whole or not at all."""
        path = Path(folder) / NAME
        value = {"format_version": VERSION, **dataclasses.asdict(self)}
        atomic_write_text(path, json.dumps(value, indent=1) + "\n")
        return path

    @classmethod
    def read(cls, folder: str | os.PathLike) -> EngineFile:
        """What `voco export` wrote into ``folder``.

        Raises:
            FileNotFoundError: there is none.
            VoCoCacheError: it is damaged, or of another format version.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; make the folder with voco export CHECKPOINT DIR.")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            version = value.pop("format_version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise VoCoCacheError(f"{path} is damaged ({error}); export the checkpoint again.") from error
        if version != VERSION:
            raise VoCoCacheError(
                f"{path} is of format version {version}, this package reads {VERSION}; export the checkpoint "
                "again."
            )
        try:
            layers = tuple(LayerRope(x["kind"], tuple(map(float, x["inv_freq"]))) for x in value["layers"])
            ids = {name: tuple(map(int, value[name])) for name in ("image_ids", "input_only")}
            found = cls(**{**value, **ids, "layers": layers})
        except (TypeError, KeyError, ValueError) as error:
            raise VoCoCacheError(f"{path} is damaged ({error}); export the checkpoint again.") from error
        if len(layers) != found.num_layers or any(x.kind not in ("none", *_TURNS) for x in layers):
            raise VoCoCacheError(f"{path} is damaged (its layers); export the checkpoint again.")
        return found


__all__ = ["EngineFile", "LayerRope", "NAME"]
