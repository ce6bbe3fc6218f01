"""``compose``: an encoder, a projector and an LLM, by name, as one ordinary transformers checkpoint.

The parts are put into transformers' own composition class, so that what is saved loads without this package
(open_clip towers excepted): ``LlavaForConditionalGeneration`` for transformers and open_clip towers, and for
timm's, whose features come out in other shapes, its siblings ``PerceptionLMForConditionalGeneration`` (ViTs)
and ``FastVlmForConditionalGeneration`` (ConvNets).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from .answer_ends import answer_end, stop_at
from .composition import check_names
from .encoders.base import Encoder, load_encoder
from .image_first import image_comes_first, warn_of_image_first
from .llms import IMAGE_TOKEN, VIDEO_TOKEN, fitting_template, load_llm, template_text
from .model_paths import named
from .projectors import Projector, get_projector

logger = logging.getLogger(__name__)


def compose(
    encoder: str,
    llm: str,
    projector: str = "mlp2x_gelu",
    *,
    image_size: int | None = None,
    feature_layer: int | None = None,
    class_token: bool = False,
    chat_template: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    pretrained: bool = True,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Put an image encoder, a projector and an LLM together (paper, Sec. 3.1).

    Args:
        encoder: a name of ``registry.encoders``, ``timm/<model>``, ``open_clip/<arch>:<pretrained>``, a hub
            id or a local folder.
        llm: a name of ``registry.llms``, a hub id or a local folder of an ``AutoModelForCausalLM``, a GGUF
            file, or ``package:NAME`` for the one inside an installed package; its weights are dequantized.
        projector: a name of ``registry.projectors``; it starts from random weights.
        image_size: pixels a side; ``None`` keeps the encoder's, others interpolate its position embeddings.
        feature_layer: which layer's features are projected; ``None``: -2 for ViTs, -1 for ConvNets.
        class_token: keep the class token among the features.
        chat_template: a shipped name, a file or a text; ``None`` takes the tokenizer's own if it places
            images, else the shipped one that writes the LLM's own conversation.
        dtype: of all weights; ``None``: float32; ``auto``: the LLM's.
        attn_implementation: of the LLM; ``None``: its default.
        pretrained: false gives timm and open_clip encoders random weights.
        seed: of the projector's weights.

    Returns:
        ``(model, processor)``: an ordinary model, in eval mode, without VoCo: ``attach`` comes next.

    Raises:
        ValueError: a name is unknown, or the parts do not fit; the message says how they would.
    """
    options: dict[str, Any] = {
        "image_size": image_size,
        "feature_layer": feature_layer,
        "class_token": class_token,
    }
    check_names(encoder, llm, projector, chat_template=chat_template, seed=seed, **options)
    with named(llm, "llm"):
        language, tokenizer, spec = load_llm(llm, dtype, attn_implementation)
    tower = load_encoder(encoder, dtype=language.dtype, pretrained=pretrained, **options)
    width = language.get_input_embeddings().weight.shape[1]
    chosen = get_projector(projector, tower.hidden_size, width, tower.host)
    _grow_rows(language, tokenizer)
    ids = torch.arange(3, 11)[None] % (len(tokenizer) - 2)
    with torch.no_grad():
        before = language(input_ids=ids.to(language.device)).logits.float()

    attention = language.config._attn_implementation
    config = _config(tower, language, tokenizer, chosen)
    config.composed_of = {
        "encoder": _shown(encoder),
        "llm": _shown(llm),
        "projector": projector,
        "fixed_layers": [f"multi_modal_projector.{layer}" for layer in chosen.fixed],
    }
    model = _assembled(config, tower, language, chosen, seed)
    # the LLM's config is a part of the whole one, whose class put its default in
    model.config.text_config._attn_implementation = attention
    with torch.no_grad():
        after = model(input_ids=ids.to(language.device), attention_mask=torch.ones_like(ids)).logits.float()
    _compare_heads(llm, language.config, before, after)

    own = tokenizer.chat_template
    knows_images = isinstance(own, str) and IMAGE_TOKEN in own
    template = chat_template or spec.chat_template or (own if knows_images else fitting_template(tokenizer))
    template = template_text(template)
    processor = _processor(tower, tokenizer, template)
    _set_generation(model, language, tokenizer, spec.end_token, template)
    if image_comes_first(processor, [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]):
        warn_of_image_first(processor)
    return model.eval(), processor


def _shown(name: str) -> str:
    """A name as it may be published: of a local folder or file its last part only."""
    return Path(name).name if name and os.path.exists(Path(name).expanduser()) else name


def _grow_rows(language: Any, tokenizer: Any) -> None:
    """Embedding rows for the new tokens: the mean row. Ids below the number of rows have theirs already."""
    rows = language.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= rows:
        return
    language.resize_token_embeddings(
        needed, pad_to_multiple_of=64 if rows % 64 == 0 else None, mean_resizing=False
    )
    with torch.no_grad():
        for module in (language.get_input_embeddings(), language.get_output_embeddings()):
            module.weight[rows:] = module.weight[:rows].float().mean(dim=0).to(module.weight.dtype)


def _config(tower: Encoder, language: Any, tokenizer: Any, projector: Projector) -> Any:
    """The config of the class that hosts ``tower``."""
    from transformers import FastVlmConfig, LlavaConfig, PerceptionLMConfig

    vision, text = tower.tower.config, language.config
    for part in (vision, text):  # a local path is not published
        part._name_or_path = _shown(getattr(part, "_name_or_path", "") or "")
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    tied = bool(getattr(text, "tie_word_embeddings", False))
    if tower.host == "perception_lm":
        return PerceptionLMConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=image,
            video_token_id=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
            vision_use_cls_token=tower.drops_first,
            projector_pooling_ratio=1,
            tie_word_embeddings=tied,
        )
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image,
        "image_seq_length": tower.num_tokens,
        "projector_hidden_act": projector.act,
        "tie_word_embeddings": tied,
    }
    if tower.host == "fast_vlm":
        return FastVlmConfig(**common)
    return LlavaConfig(
        **common,
        vision_feature_layer=tower.feature_layer,
        vision_feature_select_strategy="default" if tower.drops_first else "full",
    )


def _assembled(config: Any, tower: Encoder, language: Any, projector: Projector, seed: int) -> Any:
    """The host class around the parts themselves: nothing is copied, only the projector is new."""
    import transformers

    names = {"llava": "Llava", "perception_lm": "PerceptionLM", "fast_vlm": "FastVlm"}
    cls = getattr(transformers, f"{names[tower.host]}ForConditionalGeneration")
    config.architectures = [cls.__name__]
    with torch.device("meta"):
        model = cls(config)
    decoder = language.get_decoder()
    expected = type(model.model.language_model)
    if type(decoder) is not expected:
        raise ValueError(
            f"llm: a {type(language).__name__} runs a {type(decoder).__name__}, and a composed checkpoint "
            f"would load a {expected.__name__} in its place; use another LLM."
        )
    like = language.get_input_embeddings().weight
    model.model.vision_tower = tower.tower.to(like.device)
    model.model.language_model = decoder
    model.lm_head = language.get_output_embeddings()
    made = type(model.model.multi_modal_projector)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in made.named_children():
            if isinstance(module, torch.nn.Linear):
                if name in projector.fixed:
                    torch.nn.init.eye_(module.weight)
                else:
                    module.weight.normal_(std=0.02, generator=generator)
                module.bias.zero_()
                module.requires_grad_(name not in projector.fixed)
    if projector.initialize is not None:
        projector.initialize(made)
    model.model.multi_modal_projector = made.to(like.device, like.dtype)
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if left:
        raise ValueError(f"{cls.__name__} has weights that no part brought: {', '.join(left[:3])}.")
    return model.eval()


def _compare_heads(name: str, text: Any, before: torch.Tensor, after: torch.Tensor) -> None:
    """A prompt without images must get the LLM's own logits; only a soft cap on them may be lost."""
    cap = getattr(text, "final_logit_softcapping", None)

    def same(logits: torch.Tensor) -> bool:
        return torch.allclose(before, logits, atol=1e-3, rtol=1e-2)

    if cap is None and same(after):
        return
    if cap is not None and same(cap * torch.tanh(after / cap)):
        logger.warning(
            "llm %s caps its logits softly at %s, and transformers' LLaVA classes do not: greedy answers are "
            "the same, probabilities (the loss, sampling) are sharper.",
            name,
            cap,
        )
        return
    raise ValueError(
        f"llm {name!r} cannot be composed: its head does more than a matrix product, and transformers' LLaVA "
        f"classes do not (logits of a text differ by {float((before - after).abs().max()):.3g})."
    )


def _processor(tower: Encoder, tokenizer: Any, template: str) -> Any:
    from transformers import LlavaProcessor, PerceptionLMProcessor, PerceptionLMVideoProcessor

    if tower.host == "perception_lm":
        images = tower.image_processor
        size = {"height": tower.image_size, "width": tower.image_size}
        video = PerceptionLMVideoProcessor(
            size=size, image_mean=images.image_mean, image_std=images.image_std
        )
        return PerceptionLMProcessor(
            image_processor=images,
            video_processor=video,
            tokenizer=tokenizer,
            patch_size=tower.patch_size,
            pooling_ratio=1,
            chat_template=template,
        )
    return LlavaProcessor(
        image_processor=tower.image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        num_additional_image_tokens=tower.prefix_tokens,
        vision_feature_select_strategy="default" if tower.drops_first else "full",
        chat_template=template,
    )


def _set_generation(model: Any, language: Any, tokenizer: Any, end: str | None, template: str) -> None:
    """The LLM's own generation settings; an answer's end as ``template`` writes it, and the padding, among
    them.
    """
    model.generation_config = language.generation_config
    settings, known = model.generation_config, tokenizer.get_vocab()
    written = answer_end(tokenizer, template)
    stop_at(settings, *(known.get(token) for token in (end, tokenizer.eos_token) if token))
    if written is not None:
        stop_at(settings, written.token_id)
        if written.token_id is None:
            logger.warning(
                "the chat template ends an answer with %s, at which generation cannot stop: give a template "
                "of this LLM's own conversation, or one that ends with its end of text (%r).",
                f"{written.text!r}, which is no token of this LLM" if written.text else "no token",
                tokenizer.eos_token,
            )
    settings.pad_token_id = tokenizer.pad_token_id
