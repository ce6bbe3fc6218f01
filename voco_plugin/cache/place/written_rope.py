"""How a language model's cached keys turn with position, observed and written down, for who moves them
without the model (:mod:`..engine_file`).
"""

from __future__ import annotations

from typing import Any

import torch

from ..engine_file import LayerRope
from .relocation import RelocationError, Relocator
from .rope_layout import Turn

_CHANGING = ("dynamic", "longrope")
_SHIFTS = (1, 7)


@torch.no_grad()
def written_rope(text_model: torch.nn.Module) -> tuple[LayerRope, ...]:
    """Per layer of ``text_model`` (a ``…Model`` without a head, positions on one axis) how its keys turn.

    Raises:
        RelocationError: they turn in another way than can be written, in one that changes with the length of
            the prompt, or with values that turn too.
    """
    kind = (getattr(text_model.config, "rope_parameters", None) or {}).get("rope_type")
    if kind in _CHANGING:
        raise RelocationError(
            f"rope_type={kind!r} changes its frequencies with the length of the prompt, so cached keys "
            "cannot be moved."
        )
    relocator = Relocator(text_model, multi_axis=False)
    found = []
    for layer, (of_keys, of_values) in enumerate(relocator._probe()):
        if of_values is not None:
            raise RelocationError(f"layer {layer} of {type(text_model).__name__} rotates its values.")
        found.append(LayerRope("none") if of_keys is None else _written(relocator, layer, of_keys))
    return tuple(found)


def _written(relocator: Relocator, layer: int, turn: Turn) -> LayerRope:
    text: Any = relocator.text
    attention = next(m for n, m in text.layers[layer].named_modules() if hasattr(m, "head_dim"))
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 1, attention.head_dim, generator=draw)
    keys = keys.to(text.get_input_embeddings().weight.device)
    one = torch.ones(1, dtype=torch.long, device=keys.device)
    cos, sin = relocator._cos_sin(layer, one, torch.float32)
    for frequencies in _frequencies(relocator._rotary(layer), cos[0, 0], sin[0, 0]):
        for kind in ("halves", "pairs"):
            rope = LayerRope(kind, tuple(frequencies.double().tolist()))
            theirs = [relocator._rotate(layer, turn, keys, one * shift) for shift in _SHIFTS]
            ours = [rope.move(keys[0], shift) for shift in _SHIFTS]
            if all((a[0] - b).abs().max() < 1e-4 for a, b in zip(theirs, ours, strict=True)):
                return rope
    raise RelocationError(
        f"layer {layer} of {type(text).__name__} turns its keys neither in halves nor in pairs by the "
        "frequencies in a buffer of its rope."
    )


def _frequencies(rotary: torch.nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    """The buffers whose angles the first channels show: what is read off an angle was rounded, and is then
    rounded once for each position.
    """
    found = []
    for buffer in rotary.buffers():
        if buffer.dim() == 1 and buffer.is_floating_point() and len(buffer) <= len(cos):
            angles = buffer.float()
            near = (angles.cos() - cos[: len(angles)]).abs(), (angles.sin() - sin[: len(angles)]).abs()
            if max(float(difference.max()) for difference in near) < 1e-5:
                found.append(buffer.detach().cpu())
    return found


__all__ = ["written_rope"]
