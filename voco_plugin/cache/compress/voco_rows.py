"""Stage 1 of a rival, run over its tokens alone: nothing reads the vision tokens inside the LLM.

The decoder gets the last ``K`` rows of its merged embeddings, once the rival's own are in. What it returns is
not read by anybody. An argument that is not known to be cut this way raises :class:`NotCut`, and the caller
runs the whole block, as it would without this.

Shapes: ``B`` blocks, ``N`` tokens of a block, ``K`` VoCo tokens, ``D`` width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .last_layer import LastRows, NotCut, cut_argument, rows_of

_VISION_ONLY = ("visual_pos_masks", "deepstack_visual_embeds")  # features added at vision tokens, deeper in


@contextlib.contextmanager
def voco_rows_only(text_model: torch.nn.Module, keep: int, length: int) -> Iterator[None]:
    """Inside the block, ``text_model`` runs over the last ``keep`` of ``length`` rows.

    Raises:
        NotCut: it was not handed embeddings, or something beside them that cannot be cut.
    """
    plan = LastRows(text_model, None, keep, length)

    def cut(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args or kwargs.get("inputs_embeds") is None:
            raise NotCut("the decoder is not handed embeddings by name")
        plan.cut = True
        return args, {name: _cut(name, value, plan) for name, value in kwargs.items()}

    handle = text_model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not plan.cut:
        raise NotCut("the decoder did not run")


def _cut(name: str, value: Any, plan: LastRows) -> Any:
    if name in _VISION_ONLY:
        return None
    if name == "inputs_embeds":
        return rows_of(value, 1, name, plan)
    if name == "attention_mask" and isinstance(value, dict):
        return {kind: cut_argument(name, mask, plan) for kind, mask in value.items()}
    return cut_argument(name, value, plan)
