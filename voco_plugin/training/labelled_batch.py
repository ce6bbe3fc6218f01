"""Conversations with labels on their answers, as ``VoCoSFTTrainer`` makes them, without TRL: what plug-ins of
other trainers collate. :func:`voco_plugin.wrap_collator` puts the VoCo tokens in.

Shapes: ``B`` rows, ``T`` tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.layout import tokenizer_of


def labelled_batch(
    conversations: Sequence[Sequence[dict[str, Any]]],
    processor: Any,
    template: str,
    *,
    padding_side: str = "right",
) -> dict[str, Any]:
    """``input_ids``, ``attention_mask``, ``labels`` ``(B, T)`` and the processor's pixel arguments; labels
    are the answers' tokens, as under ``assistant_only_loss``.

    Args:
        conversations: chat messages; contents are lists of parts, an image stands in its own part
            (``{"type": "image", "image": …}``), or texts.
        processor: the model's own.
        template: the text of a chat template that marks its answers
            (:func:`~voco_plugin.training.chat_templates.training_template`).

    Raises:
        ValueError: the tokenizer is a slow one, which cannot say where the answers are; or a conversation has
            no answer to learn.
    """
    if not getattr(tokenizer_of(processor), "is_fast", False):
        raise ValueError(
            f"{type(tokenizer_of(processor)).__name__} is a slow tokenizer, which does not say where the "
            "answers stand; load the fast one (AutoProcessor.from_pretrained)."
        )
    options = {"return_assistant_tokens_mask": True}
    batch = _written(conversations, processor, template, padding_side, options)
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100
    labels[batch.pop("assistant_masks") == 0] = -100
    for row, learnt in enumerate((labels != -100).any(dim=1).tolist()):
        if not learnt:
            raise ValueError(f"conversation {row}: no token of it has a label; it has no answer to learn.")
    batch["labels"] = labels
    return batch


def prompt_batch(
    conversations: Sequence[Sequence[dict[str, Any]]],
    processor: Any,
    template: str,
    *,
    padding_side: str = "left",
) -> dict[str, Any]:
    """The same of conversations that wait for an answer, without labels."""
    return _written(conversations, processor, template, padding_side, {"add_generation_prompt": True})


def _written(
    conversations: Sequence[Sequence[dict[str, Any]]],
    processor: Any,
    template: str,
    padding_side: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    # the template writes BOS itself
    more = {"padding": True, "padding_side": padding_side, "add_special_tokens": False}
    made = processor.apply_chat_template(
        [[_in_parts(message) for message in messages] for messages in conversations],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=more,
        **options,
    )
    return dict(made)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """``message`` with a list of parts for content: templates write the two in ways of their own, and TRL
    gives parts.
    """
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}
