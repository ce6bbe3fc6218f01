"""Marks that a processor reads as an image, or a model as a block: they may not stand in what people
write.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...core.layout import TokenVocabulary, tokenizer_of
from ...inference.prompts import Messages, render
from .errors import ApiError

_KIND = re.compile(r"image|img|video|vision|voco|frame|tile|row_\d|boi\b|eoi\b|patch", re.IGNORECASE)
_STAND_IN = "x"


class ImageMarks:
    """The marks of one processor and model.

    Attributes:
        texts: as they would be written.
        ids: of the tokens that stand for images, and of the VoCo token.
    """

    def __init__(self, processor: Any, vocabulary: TokenVocabulary) -> None:
        tokenizer = tokenizer_of(processor)
        self.ids = {vocabulary.voco_id, *vocabulary.placeholders}
        around = {*self.ids, *vocabulary.markers, *vocabulary.starts, *vocabulary.edges, *vocabulary.finals}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        texts = {
            str(token) for number, token in added.items()
            if number in around or (token.special and _KIND.search(str(token)))
        }  # fmt: skip
        for name in dir(processor):  # a processor looks for these in the text, whatever the tokenizer has
            if name.endswith("_token") and isinstance(mark := getattr(processor, name, None), str):
                texts.add(mark)
        own = tokenizer.convert_ids_to_tokens(sorted(self.ids))
        texts |= {text for text in own if isinstance(text, str)}
        self.texts = tuple(sorted((text for text in texts if text.strip()), key=len, reverse=True))

    def check_text(self, text: str, param: str) -> None:
        """Refuse a text that holds a mark.

        Raises:
            ApiError: it does.
        """
        for mark in self.texts:
            if mark in text:
                raise ApiError(
                    f"the text holds {mark!r}, which this model reads as a part of an image; take it out.",
                    param, "image_mark",
                )  # fmt: skip

    def check_talk(self, processor: Any, talk: Messages) -> None:
        """Refuse texts that become a mark only together, or with what the chat template writes around them.

        Raises:
            ApiError: they do.
        """
        blank = [
            {**turn, "content": [{**part, "text": _STAND_IN} if part["type"] == "text" else part
                                 for part in turn["content"]]}
            for turn in talk
        ]  # fmt: skip
        written, alone = render(processor, [talk, blank])
        for mark in self.texts:
            if written.count(mark) > alone.count(mark):
                raise ApiError(
                    f"these texts, one after the other, read as {mark!r}, a part of an image; change them.",
                    "messages", "image_mark",
                )  # fmt: skip

    def check_ids(self, ids: Sequence[int], size: int, param: str) -> None:
        """Refuse token ids that stand for images, or that the model does not have.

        Args:
            size: of the model's vocabulary.

        Raises:
            ApiError: there is one.
        """
        for token in ids:
            if not 0 <= token < size:
                raise ApiError(f"token id {token} is outside 0…{size - 1}; send ids of this model.", param)
            if token in self.ids:
                raise ApiError(f"token id {token} stands for an image; take it out.", param, "image_mark")


__all__ = ["ImageMarks"]
