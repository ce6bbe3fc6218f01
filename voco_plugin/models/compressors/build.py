"""The compressor that a ``VoCoConfig`` names."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ...config import VoCoConfig, nearest
from ...registry import compressors
from .base import Compressor
from .voco import Pooled, Slots, VoCo

TOKEN_INITS = {"learned": VoCo, "slots": Slots, "pooled": Pooled}


def build_compressor(config: VoCoConfig, width: int) -> Compressor:
    """The compressor that ``config`` names, with new weights.

    Raises:
        ValueError: an unknown name or option.
    """
    if config.compressor == "voco":
        kind: Any = TOKEN_INITS[config.token_init]
    else:
        kind = compressors.get(config.compressor)
    options = dict(config.compressor_options or {})
    known = [
        n for n in inspect.signature(kind.__init__).parameters if n not in ("self", "width", "num_tokens")
    ]
    for name in options:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(
                f"compressor {config.compressor!r} has no option {name!r}{nearest(name, known)}; {has}."
            )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(config.token_seed)
        return kind(width, config.num_tokens, **options)
    finally:
        torch.random.set_rng_state(state)
