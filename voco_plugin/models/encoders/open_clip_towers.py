"""open_clip models as vision towers: ``open_clip/<arch>[:pretrained]``, or a saved tower's folder.

``pretrained`` is one of open_clip's tags or a weights file. The text tower is read and left behind.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...config import nearest
from .base import Encoder, image_processor_of
from .spec import is_folder


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("open_clip/… needs open_clip: pip install 'voco_plugin[backbones]'.") from error
    return open_clip


def check_name(name: str) -> None:
    """Raise where open_clip has no such architecture or weights, with the nearest it has.

    Raises:
        ValueError: no such architecture or tag.
        ImportError: open_clip is not installed.
    """
    open_clip = _open_clip()
    arch, _, tag = name.partition(":")
    known = open_clip.list_models()
    if arch not in known:
        raise ValueError(f"open_clip has no architecture {arch!r}{nearest(arch, known)}.")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag and tag not in tags and not Path(tag).expanduser().is_file():
        raise ValueError(
            f"open_clip has no weights {tag!r} of {arch}{nearest(tag, tags)}; it has "
            f"{', '.join(tags) or 'none'}, or give a weights file."
        )


def load(
    source: str,
    *,
    image_size: int | None,
    feature_layer: int | None,
    class_token: bool,
    pretrained: bool = True,
) -> Encoder:
    """The :class:`Encoder` of an open_clip name, or of a folder that ``save_pretrained`` wrote."""
    from ..registration import register

    register()
    if is_folder(source):
        return _saved(source, image_size, feature_layer, class_token)
    open_clip = _open_clip()
    arch, _, tag = source.partition(":")
    check_name(source)
    if pretrained and not tag:
        raise ValueError(
            f"encoder open_clip/{source} names no weights; give open_clip/{arch}:<tag>, one of "
            f"{', '.join(open_clip.list_pretrained_tags_by_model(arch)) or 'a weights file'}."
        )
    options = {"force_image_size": image_size} if image_size else {}
    whole = open_clip.create_model(arch, pretrained=tag if tag and pretrained else None, **options)
    described = dict(open_clip.get_model_config(arch))
    vision = dict(described["vision_cfg"])
    preprocess = getattr(whole.visual, "preprocess_cfg", None) or {}
    side = image_size or vision.get("image_size", 224)
    side = side[0] if isinstance(side, (list, tuple)) else side
    vision["image_size"] = side
    quick = bool(described.get("quick_gelu", False)) or _quick(whole)
    tower = _tower(vision, described["embed_dim"], quick, whole.visual.state_dict(), side)
    figures = preprocess if isinstance(preprocess, dict) else asdict(preprocess)
    return _encoder(source, tower, side, figures, feature_layer, class_token)


def _quick(whole: Any) -> bool:
    """Whether the model was built with OpenAI's activation (its weights ask for it)."""
    return any(type(m).__name__ == "QuickGELU" for m in whole.visual.modules())


def _tower(vision: dict[str, Any], embed: int, quick: bool, weights: dict[str, Any], side: int) -> Any:
    from .open_clip_model import OpenClipVisionConfig, OpenClipVisionModel

    config = OpenClipVisionConfig(vision_cfg=vision, embed_dim=embed, quick_gelu=quick, image_size=side)
    tower = OpenClipVisionModel(config)
    tower.visual.load_state_dict(weights)
    tower.eval()
    with torch.no_grad():
        state = tower(torch.zeros(1, 3, side, side)).hidden_states[-1]
    prefix = 1 if tower.takes_tokens else 0
    config.hidden_size = state.shape[-1]
    config.patch_size = side // round((state.shape[1] - prefix) ** 0.5)
    return tower


def _saved(source: str, image_size: int | None, layer: int | None, class_token: bool) -> Encoder:
    from transformers import CLIPImageProcessor

    from .open_clip_model import OpenClipVisionModel

    tower = OpenClipVisionModel.from_pretrained(source, dtype=torch.float32)
    side = tower.config.image_size
    if image_size not in (None, side):
        raise ValueError(
            f"image_size={image_size}: the tower saved at {source} is for {side} pixels; change the size "
            "where it is first loaded, open_clip/<arch>:<pretrained>."
        )
    figures: dict[str, Any] = {}
    if (Path(source) / "preprocessor_config.json").is_file():
        saved = CLIPImageProcessor.from_pretrained(source)
        figures = {"mean": saved.image_mean, "std": saved.image_std}
    return _encoder(source, tower, side, figures, layer, class_token)


def _encoder(
    source: str, tower: Any, side: int, figures: dict[str, Any], layer: int | None, class_token: bool
) -> Encoder:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    ways = {"shortest": False, "squash": True}
    way = figures.get("resize_mode", "shortest")
    if way not in ways:
        raise ValueError(f"open_clip/{source} resizes by {way!r}, which no image processor here does.")
    processor = image_processor_of(
        side,
        figures.get("mean", OPENAI_CLIP_MEAN),
        figures.get("std", OPENAI_CLIP_STD),
        squash=ways[way],
        crop=1.0,
        resample=figures.get("interpolation", "bicubic"),
    )
    if layer is None:
        layer = -2 if tower.takes_tokens else -1
    return Encoder(
        name=f"open_clip/{source}",
        tower=tower,
        image_processor=processor,
        host="llava",
        hidden_size=tower.config.hidden_size,
        image_size=side,
        patch_size=tower.config.patch_size,
        prefix_tokens=1 if tower.takes_tokens else 0,
        feature_layer=layer,
        class_token=class_token,
    )
