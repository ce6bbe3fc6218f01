"""How much working memory one block takes in stage 1, estimated from the config: an upper bound to plan by.

For a row of ``N`` tokens (vision and VoCo), in elements of the model's dtype unless said otherwise:

    hidden states     12 · N · H              embeddings, merged features, residuals, norms (two in fp32)
    attention         N · (4·Q + 6·KV)        queries, keys, values, rotated; keys repeated for their groups
    scores            3 · heads · N² (eager, in fp32), else N² bytes of mask and its float form
    feed-forward      4 · N · I               gate, up, product, activation; of experts: those of a token
    kept              4 · L · K · KV          the VoCo tokens' keys and values, of the batch and the blocks
    whole keys        4 · L · N · KV          instead, where layers share keys or rows are padded
    pixels            4 · pixels              as given, cut out, cast, first convolution
    vision tower      (2·L_v + 16) · P · H_v + 4 · P · I_v    LLaVA's towers give all layers' hidden states
    vision scores     3 · heads_v · P² (eager)

``P`` patches are counted from the pixels and the patch size. Weights are not part of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def _first(config: Any, *names: str, default: int = 0) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            value = max((v for v in value if isinstance(v, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def _eager(config: Any) -> bool:
    return str(getattr(config, "_attn_implementation", "") or "").endswith("eager")


def _text_elements(config: Any, tokens: int, kept: int, whole: bool, size: int) -> float:
    """Bytes of one row in the language model; ``size`` bytes an element."""
    hidden = _first(config, "hidden_size", default=1)
    heads = _first(config, "num_attention_heads", default=1)
    dim = max(
        _first(config, "head_dim", default=hidden // heads), _first(config, "global_head_dim"),
        _first(config, "qk_nope_head_dim") + _first(config, "qk_rope_head_dim"),
    )  # fmt: skip
    groups = _first(config, "num_key_value_heads", default=heads)
    layers = _first(config, "num_hidden_layers", default=1)
    experts = _first(config, "num_experts_per_tok", "moe_topk", "moe_k")
    dense = _first(config, "intermediate_size", "intermediate_size_mlp", default=4 * hidden)
    wide = max(dense, experts * _first(config, "moe_intermediate_size", default=dense))
    queries, keys = heads * dim, groups * dim
    elements = tokens * (12 * hidden + 4 * queries + 6 * max(keys, queries) + 4 * wide)
    elements += 4 * layers * (tokens if whole else kept) * keys
    scores = 3 * heads * tokens**2 * max(size, 4) if _eager(config) else tokens**2 * (1 + size)
    return elements * size + scores


def _vision_elements(config: Any, pixels: int, size: int) -> float:
    """Bytes of one row in the vision tower, of ``pixels`` values."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 8 * pixels * size
    patch = _first(vision, "patch_size", default=14)
    depth = _first(vision, "temporal_patch_size", default=1)
    patches = math.ceil(pixels / (3 * depth * patch * patch)) + 1
    hidden = _first(vision, "hidden_size", "embed_dim", default=1024)
    layers = _first(vision, "num_hidden_layers", "depth", default=24)
    wide = _first(vision, "intermediate_size", "mlp_dim", default=4 * hidden)
    elements = 4 * pixels + patches * ((2 * layers + 16) * hidden + 4 * wide)
    heads = _first(vision, "num_attention_heads", "num_heads", default=16)
    scores = 3 * heads * patches**2 * max(size, 4) if _eager(vision) else 0
    return elements * size + scores


def working_memory(
    model: torch.nn.Module, tokens: int, kept: int, pixels: int, *, rows: int = 1, whole: bool = False
) -> int:
    """Bytes that a forward of ``rows`` blocks of ``tokens`` tokens takes on top of the weights (see above).

    Args:
        kept: VoCo tokens of each.
        pixels: values of all vision inputs of one block.
        whole: whether the vision tokens' keys stay until the forward ends.
    """
    size = model.get_input_embeddings().weight.element_size()
    text: Any = model.config.get_text_config()
    one = _text_elements(text, tokens, kept, whole, size) + _vision_elements(model.config, pixels, size)
    return math.ceil(rows * one)


def readable(count: float) -> str:
    """A number of bytes in words: 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
