"""A prompt's blocks as one tensor, moved to where they stand.

Shapes: ``L`` layers, ``T`` VoCo tokens of the prompt, ``H`` key-value heads, ``D`` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from voco_plugin import VoCoBlock
from voco_plugin.cache.engine_file import EngineFile

from .blocks import BlockMemory
from .request import PlacedBlock, RequestRefused, check_tokens

_VALUES_AT_ONCE = 2**16


@dataclass(frozen=True)
class PromptBlocks:
    """What stands in the KV cache for the VoCo tokens of one prompt.

    Attributes:
        places: the prompt's indices of its ``T`` VoCo tokens, ascending.
        data: ``(L, 2, T, H, D)``, keys (after RoPE) and values, in the engine's dtype.
    """

    places: tuple[int, ...]
    data: torch.Tensor

    def within(self, start: int, end: int) -> tuple[tuple[int, ...], torch.Tensor]:
        """What stands at ``start`` … ``end - 1``: the places ``(n,)`` and their data ``(L, 2, n, H, D)``."""
        chosen = [i for i, place in enumerate(self.places) if start <= place < end]
        if not chosen:
            return (), self.data[:, :, :0]
        first, last = chosen[0], chosen[-1] + 1  # places ascend, so they lie together
        return self.places[first:last], self.data[:, :, first:last]


def prompt_blocks(
    placed: Sequence[PlacedBlock],
    ids: Sequence[int],
    engine: EngineFile,
    memory: BlockMemory,
    dtype: torch.dtype,
) -> PromptBlocks:
    """Read the blocks of a prompt and move their keys.

    Raises:
        RequestRefused: one is not there, is of another K or shape, or cannot stand where the prompt has it.
    """
    blocks = [memory.block(block.key, block.block) for block in placed]
    check_tokens(placed, [block.num_tokens for block in blocks], ids, engine.voco_id)
    parts, places = [], []
    for number, (place, block) in enumerate(zip(placed, blocks, strict=True)):
        _check_block(number, place, block, engine)
        keys = _moved(torch.stack(block.keys), engine, place.at - block.position)
        both = torch.stack([keys, torch.stack(block.values)], dim=1)  # (L, 2, H, K, D)
        parts.append(both.transpose(2, 3).to(dtype))
        places += range(place.at, place.at + block.num_tokens)
    return PromptBlocks(tuple(places), torch.cat(parts, dim=2).contiguous())


def _moved(keys: torch.Tensor, engine: EngineFile, delta: int) -> torch.Tensor:
    """``EngineFile.move`` of keys ``(L, H, K, D)``, at once for layers that turn alike: small blocks would
    otherwise take their time in the number of calls, large ones in memory that is not in the CPU's cache.
    """
    at_once = max(1, _VALUES_AT_ONCE // keys[0].numel())
    for rope in dict.fromkeys(engine.layers):
        alike = [number for number, other in enumerate(engine.layers) if other == rope]
        for first in range(0, len(alike), at_once):
            some = alike[first : first + at_once]
            keys[some] = rope.move(keys[some].flatten(0, 1), delta).unflatten(0, (len(some), -1))
    return keys


def _check_block(number: int, place: PlacedBlock, block: VoCoBlock, engine: EngineFile) -> None:
    shape = (engine.num_kv_heads, block.num_tokens, engine.head_dim)
    wrong = next((t for t in (*block.keys, *block.values) if tuple(t.shape) != shape), None)
    if wrong is not None or len(block.keys) != engine.num_layers or len(block.values) != engine.num_layers:
        found = shape if wrong is None else tuple(wrong.shape)
        raise RequestRefused(
            f"block {number} ({place.key}): {len(block.keys)} layers of {found} are not the model's "
            f"{engine.num_layers} of {shape} (key-value heads, K, head dim); compress with the model that "
            "was exported."
        )
    if not block.relocatable and place.at != block.position:
        raise RequestRefused(
            f"block {number} ({place.key}) was made with block_context='prefix' at position "
            f"{block.position}, so it cannot stand at {place.at}; compress with block_context='self'."
        )
