"""The vision tower of any open_clip model as one small ``PreTrainedModel``.

Its config holds open_clip's own ``vision_cfg``, so a checkpoint rebuilds the tower without naming an
architecture. Saved and loaded as any transformers checkpoint, once this package is imported
(:mod:`voco_plugin.models.registration`).

Shapes: pixels ``(B, 3, S, S)``, hidden states ``(B, P + N, D)``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

MODEL_TYPE = "open_clip_vision"


class OpenClipVisionConfig(PreTrainedConfig):
    """What rebuilds an open_clip vision tower.

    Args:
        vision_cfg: open_clip's own dictionary for the tower.
        embed_dim: width of the joint space.
        quick_gelu: the activation of OpenAI's weights.
        hidden_size, image_size, patch_size: D and S, and a patch's side, of what the tower gives.
    """

    model_type = MODEL_TYPE

    vision_cfg: dict[str, Any] | None = None
    embed_dim: int = 512
    quick_gelu: bool = False
    hidden_size: int = 768
    image_size: int = 224
    patch_size: int = 16


class OpenClipVisionModel(PreTrainedModel):
    """An open_clip tower that answers as transformers' vision towers do.

    ``hidden_states`` are the outputs of the tower's blocks, in order, so that -1 and -2 mean what they mean
    in CLIP; maps of ConvNets and of timm trunks are flattened row by row.
    """

    config_class = OpenClipVisionConfig
    main_input_name = "pixel_values"
    input_modalities: str | list[str] = ["image"]
    base_model_prefix = "visual"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualAttentionBlock"]
    _supports_sdpa = True

    def __init__(self, config: OpenClipVisionConfig) -> None:
        super().__init__(config)
        try:
            from open_clip.model import CLIPVisionCfg, _build_vision_tower
        except ImportError as error:
            raise ImportError("open_clip/… needs open_clip: pip install 'voco_plugin[backbones]'.") from error
        options = {**(config.vision_cfg or {}), "timm_model_pretrained": False, "patch_dropout": 0.0}
        if options.get("timm_model_name"):
            options["timm_drop_path"] = None  # a frozen tower in training mode would drop whole blocks
        self.visual = _build_vision_tower(config.embed_dim, CLIPVisionCfg(**options), config.quick_gelu)
        if options.get("timm_model_name") and hasattr(self.visual.trunk, "set_input_size"):
            self.visual.set_input_size(config.image_size)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Every weight comes from a checkpoint or from open_clip's own initialisation; buffers that are not
        saved (rotary tables of timm trunks) are made again."""
        make_again = getattr(module, "init_non_persistent_buffers", None)
        if callable(make_again):
            make_again()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        if hasattr(self.visual, "set_grad_checkpointing"):
            self.visual.set_grad_checkpointing(enable)

    def get_input_embeddings(self) -> Any:
        """None: pixels have no embedding layer."""
        return None

    @property
    def takes_tokens(self) -> bool:
        """Whether the tower is open_clip's own ViT, whose class token can be had."""
        return hasattr(self.visual, "transformer")

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """``(B, 3, S, S)`` → ``hidden_states``, one ``(B, P + N, D)`` a block, and the pooled embedding."""
        pixels = pixel_values.to(self.device, self.dtype)
        if self.takes_tokens:
            found = self.visual.forward_intermediates(pixels, output_fmt="NLC", output_extra_tokens=True)
            states = tuple(
                torch.cat([prefix, patches], dim=1)
                for prefix, patches in zip(
                    found["image_intermediates_prefix"], found["image_intermediates"], strict=True
                )
            )
        else:
            found = self.visual.forward_intermediates(pixels)
            states = tuple(m.flatten(2).transpose(1, 2) for m in found["image_intermediates"])
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1], pooler_output=found.get("image_features"), hidden_states=states
        )
