"""How batches are padded: a processor's tokenizer, its padding id, and the side that a batch is padded on."""

from __future__ import annotations

from typing import Any

import torch


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def pad_id_of(processor: Any) -> int:
    """The id that ``processor`` pads with; 0 where its tokenizer has none (the attention mask hides it)."""
    return _id(getattr(tokenizer_of(processor), "pad_token_id", None))


def pad_id_of_model(model: Any) -> int:
    """The id that a transformers model pads with, from its config; 0 where it names none."""
    return _id(getattr(model.config.get_text_config(), "pad_token_id", None))


def _id(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def padding_side_of(attention_mask: torch.Tensor | None) -> str:
    """``left`` where a row of ``attention_mask`` ``(B, N)`` begins with padding, else ``right``."""
    left = attention_mask is not None and bool((attention_mask[:, 0] == 0).any())
    return "left" if left else "right"
