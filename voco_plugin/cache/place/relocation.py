"""Moving a block: rotating its cached keys by the difference of positions, in fp32 (fp64 for fp64 models).

RoPE is relative, so a key rotated for position p and rotated again by δ is the key at p + δ. How a layer
rotates (half or interleaved pairs, partly, with its own base, or not at all) is not guessed from the family's
name: it is read off the layer by running the text model on the same few embeddings at two places, and what
cannot be reproduced is refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ...core.attachment import input_device
from ...core.forward import as_cache
from .rope_layout import Turn, turns

Layers = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Keys and values of every layer."""

# one token sees itself alone wherever it stands: in bf16, no layer's rounding reaches the layers below
_PROBE_TOKENS, _PROBE_SHIFT = 1, 5


class RelocationError(ValueError):
    """This backbone's keys cannot be moved; the message says why."""


class Relocator:
    """Rotates the cached keys of one text model, wherever it keeps them.

    Most backbones cache a rotated key and a value. One with latent attention (MLA) caches a latent and, where
    the value would stand, the rotated part shared by all heads: which of the two tensors turns is probed too.
    """

    def __init__(self, text_model: torch.nn.Module, multi_axis: bool) -> None:
        self.text, self.multi_axis = text_model, multi_axis
        self._turns: list[tuple[Turn | None, Turn | None]] | None = None

    # -- what the backbone's rotary says
    # ---------------------------------------------------------------------------

    def _layer_type(self, layer: int) -> str | None:
        types = getattr(self.text.config, "layer_types", None)
        return types[layer] if types else None

    def _rotary(self, layer: int) -> torch.nn.Module:
        local = getattr(self.text, "rotary_emb_local", None)
        if local is not None and self._layer_type(layer) == "sliding_attention":
            return local
        rotary = getattr(self.text, "rotary_emb", None)
        if rotary is None:
            raise RelocationError(
                f"{type(self.text).__name__} has no rotary_emb; its keys cannot be relocated."
            )
        return rotary

    def _cos_sin(
        self, layer: int, deltas: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unscaled cos and sin of the angles of ``deltas`` ``(T,)`` positions, ``(1, T, R)`` each; ``(1, T,
        R/2)`` where the backbone rotates complex pairs.
        """
        rotary = self._rotary(layer)
        position = deltas[None]
        if self.multi_axis:
            position = position.expand(3, 1, -1)
        kwargs = {}
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            kwargs["layer_type"] = self._layer_type(layer)
        found = rotary(torch.empty(1, 1, 1, dtype=dtype, device=deltas.device), position, **kwargs)
        if isinstance(found, torch.Tensor):
            found = (found.real.to(dtype), found.imag.to(dtype))
        cos, sin = found
        if cos.dim() == 4:  # one set per axis; the axes agree where all three positions do
            cos, sin = cos[0], sin[0]
        scale = torch.sqrt(cos * cos + sin * sin)
        return cos / scale, sin / scale

    def _rotate(self, layer: int, turn: Turn, tensor: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        """``tensor`` ``(…, H, T, D)`` moved by ``deltas`` ``(T,)`` positions; of several layers that rotate
        alike, ``layer`` names one.
        """
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        cos, sin = self._cos_sin(layer, deltas, dtype)
        stacked = tensor if tensor.dim() == 4 else tensor[None]
        moved = turn(stacked.to(dtype), cos, sin).to(tensor.dtype)
        moved = torch.where((deltas == 0)[:, None], stacked, moved)  # what stays where it was changes no bit
        return moved if tensor.dim() == 4 else moved[0]

    # -- what each layer does
    # ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _probe(self) -> list[tuple[Turn | None, Turn | None]]:
        """Per layer, how its cached keys and its cached values turn (``None``: not at all).

        Raises:
            RelocationError: a layer's cache depends on positions in a way that no rotation reproduces.
        """
        device = input_device(self.text)
        generator = torch.Generator().manual_seed(0)
        rows = self.text.get_input_embeddings().weight.shape[0]
        ids = torch.randint(rows, (1, _PROBE_TOKENS), generator=generator).to(device)
        found = []
        training = self.text.training
        self.text.eval()
        try:
            for start in (0, _PROBE_SHIFT):
                cache = DynamicCache()
                position = torch.arange(start, start + _PROBE_TOKENS, device=device)[None]
                if self.multi_axis:
                    position = position.expand(3, 1, _PROBE_TOKENS)
                self.text(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    position_ids=position,
                    use_cache=True,
                    **as_cache(cache),
                )
                found.append([(layer.keys[0], layer.values[0]) for layer in cache.layers])
        finally:
            self.text.train(training)
        return [
            tuple(self._turn_of(index, here, there) for here, there in zip(*pairs, strict=True))  # type: ignore
            for index, pairs in enumerate(zip(*found, strict=True))
        ]

    def _turn_of(self, layer: int, here: torch.Tensor, there: torch.Tensor) -> Turn | None:
        # a rotation is rounded, in the model and here
        tolerance = 1e-3 if here.dtype in (torch.float32, torch.float64) else 5e-2
        size = there.abs().max().clamp_min(1e-6)
        if (here - there).abs().max() <= tolerance * size * 0.1:
            return None
        errors = []
        for turn in turns(sys.modules[type(self.text).__module__]):
            try:
                shift = torch.full((here.shape[-2],), _PROBE_SHIFT, device=here.device)
                moved = self._rotate(layer, turn, here, shift)
            except (RuntimeError, TypeError, ValueError, IndexError):  # a layout of another shape
                continue
            errors.append(float((moved - there).abs().max() / size))
            if errors[-1] <= tolerance:
                return turn
        raise RelocationError(
            f"layer {layer} of {type(self.text).__name__} encodes positions in a way that cannot be undone "
            f"(relative error {min(errors, default=float('nan')):.2g}); use its blocks where they were "
            "computed."
        )

    def move(self, tensors: Layers, deltas: torch.Tensor) -> Layers:
        """Keys and values turned by ``deltas`` positions.

        Args:
            tensors: keys and values, per layer ``(H, T, D)``: the tokens of any number of blocks, end to end.
            deltas: ``(T,)`` int64, how far each token moves.

        Raises:
            RelocationError: the backbone's rope type does not allow it.
        """
        if self._turns is None:
            self._turns = self._probe()
        moved = (list(tensors[0]), list(tensors[1]))
        for which in (0, 1):
            for turn, layers in self._alike(which, tensors[which]):
                if turn is None:
                    continue
                stack = torch.stack([tensors[which][layer] for layer in layers])
                for layer, tensor in zip(layers, self._rotate(layers[0], turn, stack, deltas), strict=True):
                    moved[which][layer] = tensor
        return moved

    def _alike(self, which: int, tensors: Sequence[torch.Tensor]) -> list[tuple[Turn | None, list[int]]]:
        """Layers that turn alike, so that they turn in one go: ``[(turn, layers)]``."""
        assert self._turns is not None
        groups: dict[tuple, list[int]] = {}
        for layer, tensor in enumerate(tensors):
            turn = self._turns[layer][which]
            key = (turn, None if turn is None else (id(self._rotary(layer)), self._layer_type(layer)))
            groups.setdefault((*key, tensor.shape), []).append(layer)
        return [(key[0], layers) for key, layers in groups.items()]


def relocator_for(state: Any, text_model: torch.nn.Module, backbone: torch.nn.Module) -> Relocator:
    """The relocator of an attached model, made once."""
    found = state.relocator
    if found is None or found.text is not text_model:
        found = Relocator(text_model, hasattr(backbone, "get_rope_index"))
        state.relocator = found
    return found
