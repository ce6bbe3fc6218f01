"""LLMs by name: hub id, conversation, special tokens; any other ``AutoModelForCausalLM`` by id or folder.

The chat templates are our own, in ``training/templates``: they write the model's conversation, put
``<image>`` where a message has an image, and mark the answers with ``{% generation %}`` for a loss on these
alone. They add no system prompt that a message does not hold (Vicuna's, which LLaVA-1.5 was tuned with,
excepted).
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import nearest, suggest_fields
from ..registry import llms
from .gguf import gguf_file, load_dequantized, readable, source_of
from .model_paths import check_model_path, looks_local

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parents[1] / "training" / "templates"
IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"

_MARKS = (
    ("<|im_sep|>", "phi4"),
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3"),
    ("<start_of_turn>", "gemma"),
    ("<|end|>", "phi3"),
    ("<<SYS>>", "llama2"),
    ("[INST]", "mistral"),
    ("ASSISTANT:", "vicuna_v1"),
)
"""What a tokenizer's own template holds → the template here that writes the same conversation."""

_TURN_TOKENS = (
    ("<|im_sep|>", "phi4"),
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3"),
    ("<start_of_turn>", "gemma"),
    ("<|end|>", "phi3"),
    ("[INST]", "mistral"),
)
"""Tokens of a vocabulary that begin a turn → the template that is written with them."""


@suggest_fields
@dataclass(frozen=True)
class LLMSpec:
    """An entry of ``registry.llms``.

    Args:
        source: hub id or local folder.
        chat_template: name of a shipped template; ``None`` takes the one that fits the tokenizer's own.
        licence: of the weights, as their publisher names it; ``unknown``: see the model card.
        hidden_size: width of the embeddings.
        end_token: what ends an answer; generation stops there too.
        pad_token: for tokenizers that name none; ``<pad>`` is added where this is ``None`` too.
    """

    source: str
    chat_template: str | None = None
    licence: str = "unknown"
    hidden_size: int | None = None
    end_token: str | None = None
    pad_token: str | None = None


def _vicuna(source: str, hidden: int) -> LLMSpec:
    return LLMSpec(source, "vicuna_v1", "llama2", hidden, "</s>", "<unk>")


def _llama2(source: str, hidden: int) -> LLMSpec:
    return LLMSpec(source, "llama2", "llama2", hidden, "</s>", "<unk>")


def _llama3(source: str, licence: str, hidden: int, pad: str | None) -> LLMSpec:
    return LLMSpec(source, "llama3", licence, hidden, "<|eot_id|>", pad)


def _chatml(source: str, hidden: int) -> LLMSpec:
    return LLMSpec(source, "chatml", "apache-2.0", hidden, "<|im_end|>")


def _gemma(source: str, hidden: int) -> LLMSpec:
    return LLMSpec(source, "gemma", "gemma", hidden, "<end_of_turn>")


_PAD3 = "<|finetune_right_pad_id|>"
PRESETS: dict[str, LLMSpec] = {
    "vicuna_7b_v1_5": _vicuna("lmsys/vicuna-7b-v1.5", 4096),
    "vicuna_13b_v1_5": _vicuna("lmsys/vicuna-13b-v1.5", 5120),
    "llama2_7b_chat": _llama2("meta-llama/Llama-2-7b-chat-hf", 4096),
    "llama2_13b_chat": _llama2("meta-llama/Llama-2-13b-chat-hf", 5120),
    "llama3_8b": _llama3("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", 4096, None),
    "llama3_1_8b": _llama3("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", 4096, _PAD3),
    "llama3_2_1b": _llama3("meta-llama/Llama-3.2-1B-Instruct", "llama3.2", 2048, _PAD3),
    "llama3_2_3b": _llama3("meta-llama/Llama-3.2-3B-Instruct", "llama3.2", 3072, _PAD3),
    "mistral_7b_v0_3": LLMSpec(
        "mistralai/Mistral-7B-Instruct-v0.3", "mistral", "apache-2.0", 4096, "</s>", "<unk>"
    ),
    "qwen2_5_0_5b": _chatml("Qwen/Qwen2.5-0.5B-Instruct", 896),
    "qwen2_5_1_5b": _chatml("Qwen/Qwen2.5-1.5B-Instruct", 1536),
    "qwen2_5_7b": _chatml("Qwen/Qwen2.5-7B-Instruct", 3584),
    "qwen3_0_6b": _chatml("Qwen/Qwen3-0.6B", 1024),
    "qwen3_1_7b": _chatml("Qwen/Qwen3-1.7B", 2048),
    "qwen3_4b": _chatml("Qwen/Qwen3-4B", 2560),
    "qwen3_8b": _chatml("Qwen/Qwen3-8B", 4096),
    "gemma2_2b": _gemma("google/gemma-2-2b-it", 2304),
    "gemma2_9b": _gemma("google/gemma-2-9b-it", 3584),
    "gemma3_1b": _gemma("google/gemma-3-1b-it", 1152),
    "phi3_5_mini": LLMSpec("microsoft/Phi-3.5-mini-instruct", "phi3", "mit", 3072, "<|end|>"),
    "phi4": LLMSpec("microsoft/phi-4", "phi4", "mit", 5120, "<|im_end|>"),
    "smollm2_135m": _chatml("HuggingFaceTB/SmolLM2-135M-Instruct", 576),
    "smollm2_360m": _chatml("HuggingFaceTB/SmolLM2-360M-Instruct", 960),
    "smollm2_1_7b": _chatml("HuggingFaceTB/SmolLM2-1.7B-Instruct", 2048),
}


def resolve_llm(name: str) -> LLMSpec:
    """What ``name`` stands for: a registered name, a local checkpoint folder, a GGUF file (its path,
    ``package:NAME``, or a folder with one), or a hub id. Loads nothing.

    Raises:
        ValueError: nothing is called so; the nearest known name is given.
        FileNotFoundError: it looks like a local folder and is none, or a package or file is not there.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"llm={name!r} must be a name, a hub id or a checkpoint folder.")
    if name in llms:
        found = llms.get(name)
        if not isinstance(found, LLMSpec):
            raise ValueError(f"llm {name!r} is a {type(found).__name__}, not an LLMSpec.")
        return found
    packed = gguf_file(name)
    if packed is not None:
        return LLMSpec(str(packed))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return LLMSpec(str(folder))
    if looks_local(name) or os.path.exists(name):
        check_model_path(name, "llm")
        raise FileNotFoundError(f"llm {name}: there is no config.json; give a checkpoint folder.")
    if name.count("/") == 1:
        return LLMSpec(name)
    known = llms.list()
    raise ValueError(
        f"llm {name!r} is not known{nearest(name, known)}; give one of `voco registry llms`, a hub id or a "
        "checkpoint folder."
    )


def template_text(name: str) -> str:
    """A chat template given as the bare name of a shipped one, a file, or the text itself.

    Raises:
        ValueError: no shipped template and no file is called so.
    """
    if "{{" in name or "{%" in name:
        return name
    shipped = TEMPLATES / f"{name}.jinja"
    file = shipped if "/" not in name and shipped.is_file() else Path(name).expanduser()
    if not file.is_file():
        known = sorted(p.stem for p in TEMPLATES.glob("*.jinja"))
        raise ValueError(
            f"chat_template {name!r} is neither a shipped template{nearest(name, known)} nor a file; "
            f"shipped: {', '.join(known)}."
        )
    return file.read_text(encoding="utf-8-sig")


def fitting_template(tokenizer: Any) -> str:
    """The name of the shipped template that writes the conversation of the tokenizer's own; without one that
    is known, the conversation that its vocabulary has the turn marks of.
    """
    own = tokenizer.chat_template or ""
    own = " ".join(own.values()) if isinstance(own, dict) else own
    for mark, name in _MARKS:
        if mark in own:
            return name
    vocab = tokenizer.get_vocab()
    for mark, name in _TURN_TOKENS:
        if mark in vocab:
            logger.warning(
                "the tokenizer has no conversation that is known here, and %s in its vocabulary: taking %s, "
                "the shipped template that is written with it (give chat_template=… for another).",
                mark,
                name,
            )
            return name
    logger.warning(
        "the tokenizer's own conversation is none that is known here: taking vicuna_v1 (give chat_template=… "
        "for another)."
    )
    return "vicuna_v1"


def refusal_of(source: str) -> str | None:
    """Why VoCo cannot work with the LLM at ``source``, told from its config (no weight is read)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .families.base import Family

    folder, packed = source_of(source)
    with readable(source):
        config = AutoConfig.from_pretrained(folder, **packed)
    if hasattr(config, "quantization_config") and packed:
        del config.quantization_config
    if getattr(config, "is_encoder_decoder", False):
        return f"{config.model_type} is an encoder-decoder"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        return f"{config.model_type} is no causal language model of transformers ({error})"
    reason = Family().refusal(model)
    if reason is not None:
        return reason
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        return (
            f"{config.model_type} has a bias in its LM head, and transformers' LLaVA classes have none: the "
            "logits would change"
        )
    return None


def load_llm(
    name: str, dtype: Any = None, attn_implementation: str | None = None
) -> tuple[Any, Any, LLMSpec]:
    """``(causal language model, tokenizer, spec)`` of an LLM by name; the tokenizer knows ``<image>``,
    ``<video>`` and padding.

    Raises:
        ValueError: the name is unknown, or the model is recurrent, convolutional, or has a head that a LLaVA
            class cannot hold.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = resolve_llm(name)
    reason = refusal_of(spec.source)
    if reason is not None:
        raise ValueError(f"llm {name!r} cannot be composed: {reason}; use another LLM.")
    # under these names the tokens survive save_pretrained, and transformers' processors find them
    named: dict[str, Any] = {"image_token": IMAGE_TOKEN, "video_token": VIDEO_TOKEN}
    folder, packed = source_of(spec.source)
    with readable(spec.source):
        tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=named, **packed)
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        named_pad = spec.pad_token if spec.pad_token in known else None
        tokenizer.add_special_tokens({"pad_token": named_pad or "<pad>"})
    tokenizer.padding_side = "left"
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    options["dtype"] = dtype or "float32"
    if packed:
        with readable(spec.source):
            return load_dequantized(spec.source, **options).eval(), tokenizer, spec
    model = AutoModelForCausalLM.from_pretrained(spec.source, **options)
    return model.eval(), tokenizer, spec


for _name, _spec in PRESETS.items():
    llms.register(_name, _spec)
