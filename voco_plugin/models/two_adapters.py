"""The two adapters of ``adapter_stages="separate"`` in a checkpoint, and in a ``PeftModel``:

checkpoint/adapter_model.safetensors        compress: LoRA for images, VoCo token's row, projector
checkpoint/read/adapter_model.safetensors   read: LoRA for text
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.adapter_stages import COMPRESS, READ


def load_both(model: Any, source: str, **hub: Any) -> Any:
    """``model`` with both adapters of ``source`` on it, neither of which trains.

    Raises:
        ValueError: ``read`` is not there, or is of another model.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights

    model = PeftModel.from_pretrained(model, source, adapter_name=COMPRESS, **hub)
    try:
        config = PeftConfig.from_pretrained(source, subfolder=READ, **hub)
        weights = load_peft_weights(source, device="cpu", subfolder=READ, **hub)
    except (OSError, ValueError) as problem:
        raise ValueError(
            f"{source} was trained with adapter_stages='separate', and its adapter {READ} is not in the "
            f"folder {READ} in it: {problem}"
        ) from problem
    model.add_adapter(READ, config)
    put_read(model, weights)
    activate_both(model, train=False)
    return model


def put_read(model: Any, weights: Mapping[str, Any]) -> None:
    """Put the weights of a saved adapter ``read`` into that of a ``PeftModel``.

    Raises:
        ValueError: they are of another model.
    """
    named = {re.sub(r"(\.lora_\w+)\.", rf"\1.{READ}.", name): value for name, value in weights.items()}
    own = {name for name in model.state_dict() if ".lora_" in name and f".{READ}." in name}
    if own != set(named):
        odd = sorted(own ^ set(named))[0]
        raise ValueError(f"the adapter {READ} was trained on another model: {odd} is in one of them alone.")
    model.load_state_dict(named, strict=False)


def save_read(model: Any, folder: str | os.PathLike, state_dict: Mapping[str, Any] | None = None) -> None:
    """Write the adapter ``read`` of a ``PeftModel`` below ``folder``. PEFT cannot: it looks for a token's row
    of it, which ``compress`` alone holds.

    Args:
        state_dict: the gathered weights, where the model's own are sharded.
    """
    from safetensors.torch import save_file

    place = Path(folder) / READ
    place.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if state_dict is None else state_dict
    own = {
        name.replace(f".{READ}.", "."): weight.detach().cpu().contiguous().clone()
        for name, weight in weights.items()
        if ".lora_" in name and f".{READ}." in name
    }
    save_file(own, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config[READ])
    config.inference_mode = True
    config.save_pretrained(place)


def activate_both(model: Any, train: bool) -> None:
    """Let both adapters of a ``PeftModel`` compute, and with ``train`` be trained."""
    model.base_model.set_adapter([COMPRESS, READ], inference_mode=not train)


__all__ = ["activate_both", "load_both", "put_read", "save_read"]
