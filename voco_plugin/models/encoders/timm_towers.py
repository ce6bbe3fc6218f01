"""timm models as vision towers, through transformers' ``TimmWrapperModel``, so that plain transformers loads
what is saved (timm installed).

What transformers 5.23 reads of a timm tower, and so what can be had:

- ``LlavaForConditionalGeneration`` takes ``hidden_states``, which the wrapper gives as ``(B, D, h, w)`` maps:
  the projector would run over the last dimension. It cannot host a timm tower.
- ``PerceptionLMForConditionalGeneration`` takes ``last_hidden_state`` as tokens ``(B, P + N, D)`` and drops
  the class token: it hosts ViT-likes. Registers would stay uncounted by its processor: refused.
- ``FastVlmForConditionalGeneration`` takes ``last_hidden_state`` as a map ``(B, D, h, w)`` and flattens it:
  it hosts ConvNets. Channels-last maps (Swin) are refused.

``last_hidden_state`` is the last layer's. A token tower for ``feature_layer=-k`` is therefore built without
its last k-1 blocks and without the final norm, which is compared with the whole model before it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...config import nearest
from .base import Encoder, image_processor_of
from .spec import is_folder


def check_name(name: str) -> None:
    """Raise where timm has no model called ``name``, with the nearest one it has. Loads no weights.

    Raises:
        ValueError: no such model, or no such weights of it.
        ImportError: timm is not installed.
    """
    timm = _timm()
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise ValueError(
            f"timm has no model {arch!r}{nearest(arch, timm.list_models())}; timm {timm.__version__}."
        )
    tags = [p.partition(".")[2] for p in timm.list_pretrained(f"{arch}.*")]
    if tag and tag not in tags:
        raise ValueError(
            f"timm has no weights {tag!r} of {arch}{nearest(tag, tags)}; it has {', '.join(tags) or 'none'}."
        )


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm/… needs timm: pip install 'voco_plugin[backbones]'.") from error
    return timm


def load(
    source: str,
    *,
    image_size: int | None,
    feature_layer: int | None,
    class_token: bool,
    pretrained: bool = True,
) -> Encoder:
    """The :class:`Encoder` of a timm model name, or of a folder that holds one (saved by timm or by
    transformers)."""
    timm = _timm()
    whole, arch, args, data = _whole(timm, source, pretrained)
    whole.eval()
    trained = tuple(data["input_size"])[-1]
    size = image_size or trained
    if size != trained:
        if hasattr(whole, "set_input_size"):
            whole.set_input_size(img_size=size)  # interpolates the position embeddings
            args = {**args, "img_size": size}
    with torch.no_grad():
        found = whole.forward_features(torch.zeros(1, 3, size, size))
    if class_token:
        raise ValueError(
            f"encoder timm/{source}: no transformers class keeps a timm tower's class token; leave "
            "class_token out, or take the tower from transformers or open_clip."
        )
    build = _token_tower if found.dim() == 3 else _map_tower
    tower, facts = build(whole, arch, args, size, feature_layer, found)
    facts["image_processor"] = _image_processor(facts["host"], size, data)
    return Encoder(name=f"timm/{source}", tower=tower, image_size=size, class_token=False, **facts)


def _whole(timm: Any, source: str, pretrained: bool) -> tuple[Any, str, dict[str, Any], dict[str, Any]]:
    """The model as timm builds it, its architecture and arguments, and its preprocessing figures."""
    if not is_folder(source):
        whole = timm.create_model(source, pretrained=pretrained, num_classes=0)
        return whole, source, {}, timm.data.resolve_model_data_config(whole)
    from transformers import TimmWrapperModel

    record = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    wrapper = TimmWrapperModel.from_pretrained(source, dtype=torch.float32)
    if wrapper.features_only:
        raise ValueError(f"encoder {source} was saved with features_only; save the whole timm model.")
    args = {k: v for k, v in (wrapper.config.model_args or {}).items() if k != "num_classes"}
    data = timm.data.resolve_data_config(dict(record.get("pretrained_cfg") or {}), model=wrapper.timm_model)
    if "img_size" in args:
        side = args["img_size"]
        data["input_size"] = (3, side, side) if isinstance(side, int) else (3, *side)
    return wrapper.timm_model, wrapper.config.architecture, args, data


def _token_tower(
    whole: Any, arch: str, args: dict[str, Any], size: int, layer: int | None, found: torch.Tensor
) -> tuple[Any, dict[str, Any]]:
    """A ViT-like tower whose ``last_hidden_state`` is what is asked for, and the facts of its encoder."""
    prefix, width = int(getattr(whole, "num_prefix_tokens", 0)), found.shape[-1]
    if prefix > 1:
        raise ValueError(
            f"encoder timm/{arch} has {prefix} tokens before its patches (registers): transformers drops the "
            "first one only and its processor counts none of the others. Take the tower from transformers "
            "(`dinov3_vit_l_16`), where registers stay among the features."
        )
    grid = round((found.shape[1] - prefix) ** 0.5)
    blocks = getattr(whole, "blocks", None)
    layer = -2 if layer is None else layer
    if blocks is None or not -len(blocks) <= layer < 0:
        raise ValueError(
            f"feature_layer={layer} of timm/{arch}: give a number from -1 to "
            f"{-len(blocks) if blocks is not None else -1}."
        )
    args = {**args, "embed_dim": width}
    if layer != -1:  # the last layer is left as timm ends it: whether it has a norm hangs on its pooling
        args |= {"global_pool": "", "depth": len(blocks) + layer + 1}
        args["use_post_transformer_norm" if type(whole).__name__ == "Eva" else "final_norm"] = False
    tower = _wrapped(arch, args, width, whole)
    _compare(whole, tower, arch, layer, size)
    facts = {"host": "perception_lm", "hidden_size": width, "patch_size": size // grid}
    return tower, facts | {"prefix_tokens": prefix, "feature_layer": layer}


def _map_tower(
    whole: Any, arch: str, args: dict[str, Any], size: int, layer: int | None, found: torch.Tensor
) -> tuple[Any, dict[str, Any]]:
    """A ConvNet whose last feature map is read."""
    width = whole.num_features
    if found.dim() != 4 or found.shape[1] != width or found.shape[2] != found.shape[3]:
        raise ValueError(
            f"encoder timm/{arch} gives features of shape {tuple(found.shape)} ({width} wide); transformers "
            "reads tokens, or maps with the channels first. Use a ViT or a ConvNet."
        )
    if layer not in (None, -1):
        raise ValueError(f"feature_layer={layer} of timm/{arch}: of a ConvNet the last map is read; give -1.")
    tower = _wrapped(arch, args, width, whole)
    facts = {"host": "fast_vlm", "hidden_size": width, "patch_size": size // found.shape[2]}
    return tower, facts | {"prefix_tokens": 0, "feature_layer": -1}


def _wrapped(arch: str, args: dict[str, Any], width: int, whole: Any) -> Any:
    """A ``TimmWrapperModel`` built from ``args`` with the weights of ``whole``."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(architecture=arch, model_args=args or None, do_pooling=False)
    config.hidden_size = width
    try:
        tower = TimmWrapperModel(config)
    except TypeError as error:
        raise ValueError(
            f"encoder timm/{arch} cannot be cut at a layer ({error}); use feature_layer=-1."
        ) from None
    weights = whole.state_dict()
    target = tower.timm_model.state_dict()
    missing = sorted(set(target) - set(weights))
    if missing:
        raise ValueError(f"encoder timm/{arch}: the whole model has no {', '.join(missing[:3])}.")
    tower.timm_model.load_state_dict({k: weights[k] for k in target})
    return tower.eval()


@torch.no_grad()
def _compare(whole: Any, tower: Any, arch: str, layer: int, size: int) -> None:
    """Raise unless the cut tower gives the features of that layer of the whole model."""
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    if layer == -1:
        wanted = whole.forward_features(pixels)
    else:
        index = len(whole.blocks) + layer
        found = whole.forward_intermediates(
            pixels,
            indices=[index],
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=True,
        )[0]
        patches, prefix = found if isinstance(found, tuple) else (found, None)
        wanted = patches if prefix is None else torch.cat([prefix, patches], dim=1)
    got = tower(pixels, do_pooling=False).last_hidden_state
    if got.shape != wanted.shape or not torch.allclose(got, wanted, atol=1e-4, rtol=1e-4):
        raise ValueError(
            f"encoder timm/{arch} cut at feature_layer={layer} gives other features than the whole model; "
            "use feature_layer=-1."
        )


def _image_processor(host: str, size: int, data: dict[str, Any]) -> Any:
    """timm's own processor writes nothing to disk, so its figures go into a class that does."""
    if host == "fast_vlm":
        return image_processor_of(
            size,
            data["mean"],
            data["std"],
            squash=data.get("crop_mode") == "squash",
            crop=float(data.get("crop_pct") or 1.0),
            resample=data.get("interpolation", "bicubic"),
        )
    from transformers import PerceptionLMImageProcessor

    plain = image_processor_of(
        size, data["mean"], data["std"], squash=True, crop=1.0, resample=data.get("interpolation", "bicubic")
    )
    return PerceptionLMImageProcessor(
        vision_input_type="vanilla",
        tile_size=size,
        size={"height": size, "width": size},
        max_num_tiles=1,
        resample=plain.resample,
        image_mean=plain.image_mean,
        image_std=plain.image_std,
    )
