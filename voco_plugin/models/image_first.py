"""A prompt whose very first thing is an image: text that cannot see the image has no first token to look at.

A language model parks attention on the first token of its sequence. Under the rule text sees none of an
image's vision tokens, so with nothing in front of the image that token is missing for all text: untrained, an
English paragraph cost 7.0 nats a token, 3.0 with one token in front (docs/training.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from ..core.layout import TokenVocabulary, tokenizer_of
from ..inference.prompts import adds_special_tokens, render

logger = logging.getLogger(__name__)

_SAID: set[str] = set()
"""Templates (or, without one, what else was asked about) that were warned of in this process."""


def image_comes_first(processor: Any, image_ids: Iterable[int]) -> bool:
    """Whether the chat template of ``processor`` writes the image of a first question before any other token.

    False where there is no template, or it cannot be rendered.

    Args:
        image_ids: the ids that an image begins with: its placeholder or start marker.
    """
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    try:
        texts = render(processor, [question])
        special = adds_special_tokens(processor, texts)
        ids = tokenizer_of(processor)(texts[0], add_special_tokens=special)["input_ids"]
    except Exception:  # a template raises what it likes, and a processor may have none
        return False
    return bool(ids) and ids[0] in set(image_ids)


def begins_image(vocab: TokenVocabulary) -> set[int]:
    """The ids that an image of this family begins with."""
    return {*vocab.placeholders, *vocab.markers, *vocab.starts, *vocab.edges}


def warn_of_image_first(processor: Any, what: str = "this chat template puts an image") -> None:
    """Say once for each chat template what an image at the very start costs."""
    template = getattr(processor, "chat_template", None)
    key = template if isinstance(template, str) else what
    if key in _SAID:
        return
    _SAID.add(key)
    logger.warning(
        "%s at the very start of a prompt, and under the rule text has no first token to look at there: an "
        "untrained LLM then reads badly (7.0 nats a token of text for 3.0 with one token in front). Begin "
        "with the BOS token or a word, unless the model was trained so (docs/training.md, Chat templates).",
        what,
    )
