"""Weights that accelerate keeps elsewhere between a module's forwards (``cpu_offload``, ``device_map`` with
``cpu`` or ``disk``): the module holds them on ``meta``, its hook has a map to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def weights_map(module: nn.Module) -> Any:
    """The map of ``module``'s hook, by names below the module; ``None`` where it keeps nothing elsewhere."""
    hook: Any = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            return one.weights_map
    return None


class Offloaded:
    """The values of a model's weights, wherever they are kept."""

    def __init__(self, model: nn.Module) -> None:
        self._maps = {
            name: held for name, module in model.named_modules() if (held := weights_map(module)) is not None
        }

    def value(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor of the weight ``name``; ``weight`` itself where it has its values.

        Raises:
            ValueError: it has none: the model was made without weights.
        """
        if not weight.is_meta:
            return weight
        parts = name.split(".")
        for end in range(len(parts), -1, -1):
            held, key = self._maps.get(".".join(parts[:end])), ".".join(parts[end:])
            if held is not None and key:
                try:
                    return held[key]
                except KeyError:
                    continue
        raise ValueError(
            f"the weight {name} has no values (it is on the meta device, and no offload hook knows it), so "
            "nobody can tell which model makes a cache; load the weights first."
        )


def in_memory(module: nn.Module) -> list[torch.Tensor | None] | None:
    """The weights that the hook of ``module`` keeps in memory, for its own parameters in their order, with
    ``None`` for one on disk, which nothing here writes to; ``None`` alone where it has no such hook.
    """
    held = weights_map(module)
    if held is None:
        return None
    prefix, kept = getattr(held, "prefix", ""), getattr(held, "dataset", held)
    kept = getattr(kept, "state_dict", kept)
    known = kept if isinstance(kept, Mapping) else {}
    return [known.get(prefix + name) for name in module._parameters]
