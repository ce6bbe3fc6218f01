"""Moving a block: rotating its cached keys by the difference of positions, in fp32 (fp64 for fp64 models).

RoPE is relative, so a key rotated for position p and rotated again by δ is the key at p + δ. How a layer
rotates (half or interleaved pairs, partly, with its own base, or not at all) is not guessed from the family's
name: it is read off the layer by running the text model on the same few embeddings at two places, and what
cannot be reproduced is refused.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from transformers import DynamicCache

_PROBE_TOKENS, _PROBE_SHIFT = 3, 5
_NONLINEAR = {"dynamic": "dynamic NTK scaling", "longrope": "longrope"}


class RelocationError(ValueError):
    """This backbone's keys cannot be moved; the message says why."""


class Relocator:
    """Rotates the keys of one text model."""

    def __init__(self, text_model: torch.nn.Module, multi_axis: bool) -> None:
        self.text, self.multi_axis = text_model, multi_axis
        self._layers: list[str | None] | None = None

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
        self, layer: int, delta: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """Unscaled cos and sin of an angle of ``delta`` positions, ``(1, 1, R)`` each."""
        rotary = self._rotary(layer)
        position = torch.full((1, 1), delta, device=device, dtype=torch.long)
        if self.multi_axis:
            position = position.expand(3, 1, 1)
        kwargs = {}
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            kwargs["layer_type"] = self._layer_type(layer)
        cos, sin = rotary(torch.empty(1, 1, 1, dtype=dtype, device=device), position, **kwargs)
        if cos.dim() == 4:  # one set per axis; the axes agree where all three positions do
            cos, sin = cos[0], sin[0]
        scale = torch.sqrt(cos * cos + sin * sin)
        return cos / scale, sin / scale

    def _rotate(self, layer: int, key: torch.Tensor, delta: int) -> torch.Tensor:
        """``key`` ``(H, K, D)`` moved by ``delta`` positions."""
        dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
        cos, sin = self._cos_sin(layer, delta, dtype, key.device)
        apply = getattr(sys.modules[type(self.text).__module__], "apply_rotary_pos_emb", None)
        wide = key.to(dtype)[None]
        if apply is None:
            half = wide.shape[-1] // 2
            turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
            moved = wide * cos[:, None] + turned * sin[:, None]
        else:
            moved = apply(wide, wide, cos, sin)[1]
        return moved[0].to(key.dtype)

    # -- what each layer does
    # ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _probe(self) -> list[str | None]:
        """Per layer ``"rotate"`` or ``"none"`` (no position encoding); raises where neither reproduces it."""
        weight = next(self.text.parameters())
        generator = torch.Generator().manual_seed(0)
        width = self.text.config.hidden_size
        embeds = torch.randn(1, _PROBE_TOKENS, width, generator=generator).to(weight.device, weight.dtype)
        found = []
        training = self.text.training
        self.text.eval()
        try:
            for start in (0, _PROBE_SHIFT):
                cache = DynamicCache()
                position = torch.arange(start, start + _PROBE_TOKENS, device=weight.device)[None]
                if self.multi_axis:
                    position = position.expand(3, 1, _PROBE_TOKENS)
                mask = torch.ones(1, _PROBE_TOKENS, dtype=torch.long, device=weight.device)
                self.text(
                    inputs_embeds=embeds,
                    attention_mask=mask,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                )
                found.append([layer.keys[0] for layer in cache.layers])
        finally:
            self.text.train(training)
        tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        kinds: list[str | None] = []
        for index, (here, there) in enumerate(zip(*found, strict=True)):
            size = there.abs().max().clamp_min(1e-6)
            if (here - there).abs().max() <= tolerance * size * 0.1:
                kinds.append("none")
                continue
            moved = self._rotate(index, here, _PROBE_SHIFT)
            error = float((moved - there).abs().max() / size)
            if not error <= tolerance:
                raise RelocationError(
                    f"layer {index} of {type(self.text).__name__} encodes positions in a way that cannot be "
                    f"undone (relative error {error:.2g}); use its blocks where they were computed."
                )
            kinds.append("rotate")
        return kinds

    def _check_range(self, position: int) -> None:
        parameters = getattr(self.text.config, "rope_parameters", None) or {}
        sets = parameters.values() if all(isinstance(v, dict) for v in parameters.values()) else [parameters]
        for values in sets:
            kind = (values or {}).get("rope_type") if isinstance(values, dict) else None
            if kind in _NONLINEAR:
                limit = values.get("original_max_position_embeddings") or getattr(
                    self.text.config, "original_max_position_embeddings", None
                )
                limit = limit or self.text.config.max_position_embeddings
                if position >= limit:
                    raise RelocationError(
                        f"{_NONLINEAR[kind]} changes its frequencies past {limit} positions, so a block "
                        f"cannot be moved to {position}; keep the stream below {limit}."
                    )

    def move(self, keys: tuple[torch.Tensor, ...], source: int, target: int) -> tuple[torch.Tensor, ...]:
        """Keys rotated for ``source`` → the same keys rotated for ``target``. Per layer ``(H, K, D)``.

        Raises:
            RelocationError: the backbone's rope type does not allow it.
        """
        if source == target:
            return keys
        if self._layers is None:
            self._layers = self._probe()
        self._check_range(target + (keys[0].shape[1] - 1))
        return tuple(
            self._rotate(i, key, target - source) if self._layers[i] == "rotate" else key
            for i, key in enumerate(keys)
        )


def relocator_for(state: Any, text_model: torch.nn.Module, backbone: torch.nn.Module) -> Relocator:
    """The relocator of an attached model, made once."""
    found = getattr(state, "relocator", None)
    if found is None or found.text is not text_model:
        found = Relocator(text_model, hasattr(backbone, "get_rope_index"))
        state.relocator = found
    return found
