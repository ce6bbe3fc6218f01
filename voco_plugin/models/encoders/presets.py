"""Named encoders: hub id or library name, licence of the weights, and the figures that need no loading.

``licence`` is what the publisher's model card states; ``unknown`` where the card names none.
"""

from __future__ import annotations

from .spec import EncoderSpec

_APACHE, _MIT = "apache-2.0", "mit"


def _tower(source: str, licence: str, hidden: int, size: int, patch: int, prefix: int = 0) -> EncoderSpec:
    return EncoderSpec(source, "transformers", licence, hidden, size, patch, -2, prefix)


def _timm(source: str, licence: str, hidden: int, size: int, patch: int, layer: int = -2) -> EncoderSpec:
    return EncoderSpec(source, "timm", licence, hidden, size, patch, layer)


def _open_clip(source: str, licence: str, hidden: int, size: int, patch: int, layer: int = -2) -> EncoderSpec:
    return EncoderSpec(source, "open_clip", licence, hidden, size, patch, layer)


PRESETS: dict[str, EncoderSpec] = {
    "clip_vit_l_14": _tower("openai/clip-vit-large-patch14", "unknown", 1024, 224, 14),
    "clip_vit_l_14_336": _tower("openai/clip-vit-large-patch14-336", "unknown", 1024, 336, 14),
    "siglip_so400m_384": _tower("google/siglip-so400m-patch14-384", _APACHE, 1152, 384, 14),
    "siglip2_so400m_384": _tower("google/siglip2-so400m-patch14-384", _APACHE, 1152, 384, 14),
    "siglip2_base_224": _tower("google/siglip2-base-patch16-224", _APACHE, 768, 224, 16),
    # its checkpoint is configured for 518 pixels; its image processor crops to 224
    "dinov2_large": _tower("facebook/dinov2-large", _APACHE, 1024, 224, 14),
    # four registers stay
    "dinov3_vit_l_16": _tower(
        "facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov3-license", 1024, 224, 16, prefix=4
    ),
    "eva_clip_g_224": _timm("eva_giant_patch14_224.clip_ft_in1k", _MIT, 1408, 224, 14),
    "timm_vit_so400m_384": _timm("vit_so400m_patch14_siglip_384.webli", _APACHE, 1152, 384, 14),
    "timm_convnext_l_clip_384": _timm(
        "convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_384", _APACHE, 1536, 384, 32, layer=-1
    ),
    "open_clip_vit_l_14": _open_clip("ViT-L-14:laion2b_s32b_b82k", _MIT, 1024, 224, 14),
    "open_clip_vit_h_14": _open_clip("ViT-H-14:laion2b_s32b_b79k", _MIT, 1280, 224, 14),
    "open_clip_convnext_l_320": _open_clip(
        "convnext_large_d_320:laion2b_s29b_b131k_ft_soup", _MIT, 1536, 320, 32, layer=-1
    ),
}
