"""What a chat template ends an answer with, and whether generation stops there.

A model learns to end its answers as the template that it is tuned with writes them. Where that is another
token than the tokenizer's own end of text, generation has to be told, or answers never end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.layout import tokenizer_of

_ANSWER = "ANSWER"


@dataclass(frozen=True)
class AnswerEnd:
    """What stands right after an answer.

    Attributes:
        text: up to the next white space; empty where the template ends an answer with nothing.
        token_id: the token that it is, or begins with; ``None`` where it is none, so that no token alone ends
            an answer.
    """

    text: str
    token_id: int | None


def answer_end(processor: Any, template: str | None) -> AnswerEnd | None:
    """How ``template`` ends an answer; ``None`` where it cannot be rendered with a plain conversation.

    Args:
        processor: or a tokenizer.
    """
    tokenizer = tokenizer_of(processor)
    if not isinstance(template, str) or not hasattr(tokenizer, "apply_chat_template"):
        return None
    rendered = _rendered(tokenizer, template)
    if rendered is None or _ANSWER not in rendered:
        return None
    words = rendered.rpartition(_ANSWER)[2].split()
    if not words:
        return AnswerEnd("", None)
    vocab = tokenizer.get_vocab()
    marks = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} & set(vocab)
    found = max((mark for mark in marks if words[0].startswith(mark)), key=len, default=None)
    found = words[0] if found is None and words[0] in vocab else found
    return AnswerEnd(words[0] if found is None else found, None if found is None else vocab[found])


def _rendered(tokenizer: Any, template: str) -> str | None:
    """A conversation of one turn; templates take a message's content as parts, or as a text."""

    def turns(said: Any) -> list[dict[str, Any]]:
        return [
            {"role": role, "content": said(text)} for role, text in (("user", "Q"), ("assistant", _ANSWER))
        ]

    for said in (lambda text: [{"type": "text", "text": text}], lambda text: text):
        try:
            found = tokenizer.apply_chat_template(turns(said), chat_template=template, tokenize=False)
        except Exception:  # a template raises what it likes
            continue
        if _ANSWER in found:
            return found
    return None


def stop_at(settings: Any, *token_ids: int | None) -> bool:
    """Add tokens to those at which a ``GenerationConfig`` stops; whether that changed anything."""
    ends = settings.eos_token_id
    before = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    after = list(dict.fromkeys([*before, *(token for token in token_ids if token is not None)]))
    if after != before:
        settings.eos_token_id = after[0] if len(after) == 1 else after
    return after != before
