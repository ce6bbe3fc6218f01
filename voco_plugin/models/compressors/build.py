"""The compressor that a ``VoCoConfig`` names."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ...config import VoCoConfig, nearest
from ...registry import compressors
from .base import Compressor
from .queries import Queries
from .voco import Pooled, Slots, VoCo

TOKEN_INITS = {"learned": VoCo, "slots": Slots, "pooled": Pooled, "queries": Queries}


def build_compressor(config: VoCoConfig, width: int) -> Compressor:
    """The compressor that ``config`` names, with new weights.

    Raises:
        ValueError: an unknown name or option.
    """
    if config.compressor == "voco":
        kind: Any = TOKEN_INITS[config.token_init]
        name = f"token_init {config.token_init!r}"
    else:
        kind, name = compressors.get(config.compressor), f"compressor {config.compressor!r}"
    options = dict(config.compressor_options or {})
    known = [
        n for n in inspect.signature(kind.__init__).parameters if n not in ("self", "width", "num_tokens")
    ]
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{name} has no option {option!r}{nearest(option, known)}; {has}.")
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(config.token_seed)
        return kind(width, config.num_tokens, **options)
    finally:
        torch.random.set_rng_state(state)
