"""Conversations with labels on their answers, as ``VoCoSFTTrainer`` makes them, without TRL: what plug-ins of
other trainers collate. :func:`voco_plugin.wrap_collator` puts the VoCo tokens in.

Shapes: ``B`` rows, ``T`` tokens a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from .._compat import answers_are_marked_wrongly
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
    if answers_are_marked_wrongly():
        batch = _marked_here(conversations, processor, template, padding_side)
    else:
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
    **more: Any,
) -> dict[str, Any]:
    # the template writes BOS itself
    more = {"padding": True, "padding_side": padding_side, "add_special_tokens": False, **more}
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


def _marked_here(
    conversations: Sequence[Sequence[dict[str, Any]]], processor: Any, template: str, padding_side: str
) -> dict[str, Any]:
    """As :func:`_written` with ``assistant_masks``, where transformers marks answers wrongly: as 5.18 does.

    Raises:
        ValueError: the processor does not say where in the text images came to stand.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    batch = _written(
        conversations, processor, template, padding_side, {},
        return_offsets_mapping=True, return_text_replacement_offsets=True,
    )  # fmt: skip
    offsets, replaced = batch.pop("offset_mapping").tolist(), batch.pop("text_replacement_offsets", None)
    if replaced is None and any(key.startswith(("pixel_", "image_")) for key in batch):
        raise ValueError(
            f"{type(processor).__name__} does not say where images come to stand in the text, and this "
            "transformers marks the answers behind them wrongly; use transformers 5.18 or later."
        )
    rendered: Any = render_jinja_template(
        conversations=[[_in_parts(message) for message in messages] for messages in conversations],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        **processor.tokenizer.special_tokens_map,
    )
    _, spans = rendered  # of each conversation, (start, end) of its answers in the text
    masks = torch.zeros_like(batch["input_ids"])
    for row, marked in enumerate(spans):
        images = (replaced[row] if replaced else None) or []
        ends = [image["span"][1] for image in images]
        gained = [0, *(image["new_span"][1] - image["span"][1] for image in images)]
        for span in marked:
            start, end = (char + gained[bisect.bisect_right(ends, char)] for char in span)
            for place, (first, last) in enumerate(offsets[row]):
                if first < end and last > start:
                    masks[row, place] = 1
    return {**batch, "assistant_masks": masks}
