"""LLaVA models of known sizes with random weights: what is timed does not depend on what was learnt."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ..config import VoCoConfig
from ..models import attach


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vision": _sizes(32, 64, 3, 2), "text": _sizes(64, 172, 2, 4)},
    "small": {"vision": _sizes(128, 512, 3, 4), "text": _sizes(512, 1376, 8, 8)},
    "medium": {"vision": _sizes(128, 512, 3, 4), "text": _sizes(1024, 2752, 8, 8)},
    "vicuna7b": {"vision": _sizes(1024, 4096, 24, 16), "text": _sizes(4096, 11008, 32, 32)},
}
"""``vicuna7b`` is LLaVA-1.5-7B's; ``medium`` and ``small`` are a quarter and an eighth as wide."""
IMAGE_SIZE, PATCH = 336, 14
VISION_TOKENS = (IMAGE_SIZE // PATCH) ** 2
VOCABULARY = 32064
IMAGE, VOCO = VOCABULARY - 64, VOCABULARY - 63
BEFORE = 8
"""Text tokens before the image in :func:`prompt`."""


def build(
    shape: str = "small", device: str = "cpu", dtype: str = "float32", *, layers: int | None = None,
    vision: str | None = None, vocabulary: int = VOCABULARY, image_size: int = IMAGE_SIZE,
    random: bool = True,
) -> LlavaForConditionalGeneration:  # fmt: skip
    """A LLaVA-1.5 of the given shape with random weights, in evaluation mode.

    Args:
        layers: of the language model, where not the shape's.
        vision: the shape whose vision tower is used instead.
        vocabulary: rows of the embedding; the image's id is the 64th from the end, the VoCo token's the next.
        image_size: pixels; an image has ``(image_size / 14)²`` vision tokens.
        random: ``False`` gives all weights one value, which is quick, and enough to count by.
    """
    tower, text = SHAPES[vision or shape]["vision"], dict(SHAPES[shape]["text"])
    if layers is not None:
        text["num_hidden_layers"] = layers
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=image_size, patch_size=PATCH, **tower),
        text_config=LlamaConfig(vocab_size=vocabulary, pad_token_id=0, **text),
        image_token_index=vocabulary - 64, image_seq_length=(image_size // PATCH) ** 2,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device) if random else init_empty_weights(include_buffers=False):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    if not random:
        for module in model.modules():
            for name, empty in list(module.named_parameters(recurse=False)):
                value = torch.full(empty.shape, 0.01, dtype=empty.dtype, device=device)
                module.register_parameter(name, torch.nn.Parameter(value))
    return model.to(device).eval()  # type: ignore[arg-type]


def voco_id(model: Any) -> int:
    """The id that serves as VoCo token of a model of :func:`build`."""
    return int(model.config.image_token_id) + 1


def twin(model: Any) -> Any:
    """A second model on the same weights."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def pair(model: Any) -> tuple[Any, Any]:
    """``(plain, attached)``: the same weights, VoCo attached to the model itself."""
    plain = twin(model)
    return plain, attach(model, VoCoConfig(token_id=voco_id(model)))


def prompt(model: Any, text: int, num_tokens: int, rows: int, images: int = 1) -> dict[str, Any]:
    """``rows`` prompts ``[8 text, (vision, VoCo) x images, text]``, random ids and pixels."""
    draw = torch.Generator().manual_seed(1)
    image = int(model.config.image_token_id)
    block = torch.full((rows, model.config.image_seq_length + num_tokens), image)
    block[:, model.config.image_seq_length :] = voco_id(model)
    parts = [torch.randint(5, image - 1, (rows, n), generator=draw) for n in (BEFORE, text)]
    ids = torch.cat([parts[0], *[block] * images, parts[1]], dim=1)
    side = model.config.vision_config.image_size
    pixels = torch.randn(rows * images, 3, side, side, generator=draw).to(model.dtype)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in batch.items()}


def without_voco(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same prompts as the plain model gets them; each row has as many VoCo tokens."""
    ids = inputs["input_ids"]
    ids = ids[ids != voco_id(model)].view(len(ids), -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}


def batch_of(model: Any, images: int, num_tokens: int) -> dict[str, Any]:
    """``[vision, VoCo]`` of each image, ``(images, 576 + K)``, and random pixels."""
    tokens, side = int(model.config.image_seq_length), int(model.config.vision_config.image_size)
    ids = torch.full((images, tokens + num_tokens), int(model.config.image_token_id))
    ids[:, tokens:] = voco_id(model)
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in batch.items()}


def token_bytes(model: Any) -> int:
    """Bytes of one token's keys and values: 2 · layers · KV heads · head size · bytes of an element."""
    text = model.config.text_config
    heads = text.num_key_value_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * dim * torch.finfo(model.dtype).bits // 8
