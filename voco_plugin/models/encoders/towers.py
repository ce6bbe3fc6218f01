"""Vision towers of transformers: CLIP, SigLIP, SigLIP2 (fixed resolution), DINOv2, DINOv3 and their like.

The tower of a two-tower checkpoint (CLIP, SigLIP) is read without its text tower. Features are
``hidden_states[feature_layer]``, as LLaVA takes them. What may surprise:

- Registers (DINOv2 with registers, DINOv3) stay among the features: LLaVA's ``default`` strategy drops the
  first token only. They follow the class token and come before the patches.
- CLIP and SigLIP learn one row a position: another ``image_size`` interpolates the rows once (bicubic, as
  transformers does at run time) and stores them, so that the checkpoint needs no option to run. DINOv2
  interpolates at run time, DINOv3 has rotary positions: both take other sizes as they are.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch

from .base import Encoder, pixels_of

logger = logging.getLogger(__name__)


def load(source: str, *, image_size: int | None, feature_layer: int | None, class_token: bool) -> Encoder:
    """The :class:`Encoder` at ``source``; see :func:`~voco_plugin.models.encoders.base.load_encoder`."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(source)
    config = getattr(config, "vision_config", config)
    for name in ("image_size", "patch_size", "hidden_size"):
        if not isinstance(getattr(config, name, None), (int, list, tuple)):
            raise ValueError(
                f"encoder {source}: a {config.model_type} has no {name}; its output is no fixed grid of "
                "patches. Use a CLIP, SigLIP or DINO tower, or a timm or open_clip model."
            )
    if getattr(config, "vision_use_head", False):
        config.vision_use_head = False  # SigLIP's pooling head, which no feature passes through
    tower = AutoModel.from_pretrained(source, config=config, dtype=torch.float32)
    trained = pixels_of(config)
    size = image_size or trained
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    if size < patch:
        raise ValueError(f"image_size={size} is smaller than a patch of {patch} pixels.")
    processor = _image_processor(source, size, trained)
    if size != trained:
        tower = resized(tower, size)
    layer = -2 if feature_layer is None else feature_layer
    with torch.no_grad():
        pixels = torch.zeros(1, 3, size, size)
        try:
            states = tower(pixels, output_hidden_states=True).hidden_states
            found = states[layer]
        except IndexError:
            raise ValueError(f"feature_layer={layer}: {source} has {len(states)} hidden states.") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"encoder {source} ({config.model_type}) does not take pixel_values of (1, 3, {size}, "
                f"{size}) alone: {error}"
            ) from None
    if found.dim() != 3:
        raise ValueError(
            f"encoder {source} ({config.model_type}) gives maps of shape {tuple(found.shape)}, not tokens; "
            "take the same network from timm (timm/<model>), whose maps are read."
        )
    prefix = found.shape[1] - (size // patch) ** 2
    return Encoder(
        name=source,
        tower=tower,
        image_processor=processor,
        host="llava",
        hidden_size=found.shape[-1],
        image_size=size,
        patch_size=patch,
        prefix_tokens=prefix,
        feature_layer=layer,
        class_token=class_token,
    )


def resized(tower: Any, size: int) -> Any:
    """``tower`` for images of ``size`` pixels: learned position rows interpolated, everything else as it is.

    A tower without a table of learned rows comes back unchanged.
    """
    tables = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embedding")
    ]
    if not tables:
        return tower
    config = copy.deepcopy(tower.config)
    config.image_size = size
    new = type(tower)(config).to(next(tower.parameters()).dtype)
    state = tower.state_dict()
    fresh = new.state_dict()
    for name, module in tables:
        key = f"{name}.weight"
        state[key] = interpolate_rows(module.weight.detach(), fresh[key].shape[0])
    for key in [k for k in state if k.endswith("position_ids")]:
        state[key] = fresh[key]
    new.load_state_dict(state)
    return new.eval()


def interpolate_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Position rows ``(P + h·h, D)`` → ``(P + n·n, D)``, ``count`` of them; the P first stay as they are."""
    old = math.isqrt(rows.shape[0])
    prefix = rows.shape[0] - old * old
    side = math.isqrt(count - prefix)
    if side * side != count - prefix:
        raise ValueError(f"{count} positions with {prefix} before the patches are no square grid.")
    grid = rows[prefix:].T.reshape(1, -1, old, old).float()
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    patches = grid.flatten(2)[0].T.to(rows.dtype)
    return torch.cat([rows[:prefix], patches])


def _image_processor(source: str, size: int, trained: int) -> Any:
    from transformers import AutoImageProcessor, CLIPImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        logger.warning(
            "%s has no image processor (%s): taking CLIP's mean and spread, at %d pixels.",
            source,
            error,
            size,
        )
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    edge = dict(processor.size or {})
    cropped = bool(getattr(processor, "do_center_crop", False)) and getattr(processor, "crop_size", None)
    if cropped:
        before = dict(processor.crop_size)["height"]
        processor.crop_size = {"height": size, "width": size}
        if "shortest_edge" in edge:  # keep the share that the crop leaves
            processor.size = {"shortest_edge": round(edge["shortest_edge"] * size / before)}
        else:
            processor.size = {"height": size, "width": size}
    elif "shortest_edge" in edge:
        raise ValueError(
            f"the image processor of {source} resizes the shorter side and does not crop: images would not "
            "be square. Use another encoder."
        )
    else:
        processor.size = {"height": size, "width": size}
    return processor
