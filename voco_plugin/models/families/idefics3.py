"""Idefics3 and SmolVLM: one image is a grid of tiles with row, column and newline tokens between them."""

from __future__ import annotations

import re
from typing import Any

from .base import Family

_MARKER = re.compile(r"<row_\d+_col_\d+>|<global-img>|<fake_token_around_image>")


class Idefics3(Family):
    """Markers come from the tokenizer's added tokens; the newlines between tile rows are glue."""

    images_by_row = True

    def markers(self, config: Any, processor: Any) -> tuple[set[int], set[int]]:
        starts, others = super().markers(config, processor)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is not None:
            others |= {i for token, i in tokenizer.get_vocab().items() if _MARKER.fullmatch(token)}
        return starts, others

    def edges(self, config: Any, processor: Any) -> set[int]:
        tokenizer = getattr(processor, "tokenizer", None)
        fake = self._fake(processor)
        known = tokenizer.get_vocab() if tokenizer is not None else {}
        return {known[fake]} if fake in known else set()

    def finals(self, config: Any, processor: Any) -> set[int]:
        token = getattr(processor, "global_image_tag", None) or getattr(processor, "global_image_token", None)
        token = getattr(token, "content", token) or "<global-img>"
        tokenizer = getattr(processor, "tokenizer", None)
        known = tokenizer.get_vocab() if tokenizer is not None else {}
        return {known[token]} if token in known else set()

    @staticmethod
    def _fake(processor: Any) -> str:
        fake = getattr(processor, "fake_image_token", None)
        return getattr(fake, "content", fake) or "<fake_token_around_image>"

    def glue(self, config: Any, processor: Any) -> set[int]:
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            return set()
        fake = self._fake(processor)
        found: set[int] = set()
        for newlines in ("\n", "\n\n"):
            # tokenized where they stand, between two markers: a tokenizer may join or split them
            inner = tokenizer(f"{fake}{newlines}{fake}", add_special_tokens=False)["input_ids"]
            edge = tokenizer(fake, add_special_tokens=False)["input_ids"]
            found |= set(inner) - set(edge)
        return found


class Idefics2(Idefics3):
    """Idefics 2 does not tile with newlines: a newline between two images is the user's."""

    def glue(self, config: Any, processor: Any) -> set[int]:
        return set()
