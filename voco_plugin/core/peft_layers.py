"""PEFT's layers in a model: which modules they are, and whether the weights under them are the base's."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def is_tuner(kind: type) -> bool:
    """Whether modules of this class are PEFT layers, whose adapters can be switched (a transformers model has
    methods so named).
    """
    return isinstance(getattr(kind, "disable_adapters", None), property)


def what_changed_the_base(configs: Any) -> str | None:
    """The setting of an adapter that writes to the weights it stands on, so that switching it off does not
    give the model it was made on; ``None`` where there is none.

    PEFT's initializations that take a part of the weights out and put it into the adapter (PiSSA, OLoRA,
    CorDA, LoRA-GA, LoftQ), KaSA, which cuts small singular values off, and ``bias``, which trains in place.

    Args:
        configs: PEFT configs (a model's ``peft_config`` is a dict of them).
    """
    for config in configs.values() if isinstance(configs, dict) else configs:
        init = getattr(config, "init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(_REWRITING):
            return f"init_lora_weights={init!r}"
        if getattr(config, "kasa_config", None) is not None:
            return "kasa_config"
        if getattr(config, "bias", "none") in ("all", "lora_only"):
            return f"bias={config.bias!r}"
    return None


_REWRITING = ("pissa", "olora", "corda", "lora_ga", "loftq")


__all__ = ["is_tuner", "what_changed_the_base"]
