"""Stage 1 with the weights that training started from: a forward that leaves the model's adapters out.

    compress   [V C]   base weights                     what the store's blocks are made by
    read       text    base weights + adapter           what trained (``stage1: frozen``)

PEFT's own switch is one flag a layer: a thread that answers while another compresses would answer without the
adapter. Here a layer asks which forward its own thread runs.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .extension import Extension, extend
from .forward import running_forward
from .peft_layers import is_tuner, what_changed_the_base


class AsksForAdapter(Extension):
    """What a PEFT layer is extended by: without its adapter, it is the layer it stands on."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        running = running_forward()
        if running is None or not running.mode.without_adapter:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        kwargs.pop("adapter_names", None)  # PEFT's, which names the adapter of each row
        return self.base_layer(x, *args, **kwargs)  # type: ignore[attr-defined]


def can_leave_out_adapters(model: nn.Module) -> None:
    """Let ``model`` run a forward in the mode ``without_adapter`` (idempotent).

    Raises:
        ValueError: there is no adapter to leave out, it is merged into the weights, or it holds whole modules
            or rows, which stage 1 would have read as they were.
    """
    layers = [module for module in model.modules() if is_tuner(type(module))]
    what = "this model's stage 1 is frozen (frozen_stage1): it compresses without its adapter, and"
    if not layers:
        raise ValueError(
            f"{what} it has none (it was merged, or not loaded); load the checkpoint folder with "
            "voco_plugin.load, or the starting model alone without frozen_stage1."
        )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(f"{what} the adapter is merged into its weights; call unmerge_adapter() first.")
    odd = next((layer for layer in layers if not hasattr(layer, "base_layer")), None)
    if odd is not None:
        raise ValueError(f"{what} a {type(odd).__name__} holds whole modules or rows; train LoRA alone.")
    changed = what_changed_the_base(getattr(model, "peft_config", None) or {})
    if changed is not None:
        raise ValueError(
            f"{what} {changed} has changed the weights under it; merge the adapter and train a new one."
        )
    for layer in layers:
        extend(layer, AsksForAdapter)


__all__ = ["can_leave_out_adapters", "is_tuner", "what_changed_the_base"]
