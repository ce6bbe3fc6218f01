"""A single token as text and as bytes, as OpenAI's log-probabilities name it.

A token may be a part of a character: its bytes are exact, its text then holds ``\\ufffd``.
"""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"  # how SentencePiece writes a space


class TokenBytes:
    """Names the tokens of one tokenizer; asked twice it looks once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        state = b"" if decoder is None else bytes(decoder.__getstate__())
        self._alphabet = _byte_alphabet() if b"ByteLevel" in state else None
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def __call__(self, token: int) -> tuple[str, bytes]:
        """``(text, bytes)`` of ``token``."""
        if token not in self._known:
            data = self._bytes(token)
            self._known[token] = (data.decode("utf-8", errors="replace"), data)
        return self._known[token]

    def is_special(self, token: int) -> bool:
        """Whether it is left out of the text of an answer."""
        return token in self._special

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # a row of the model beyond the tokenizer's words
            return b""
        byte = _BYTE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        if self._alphabet is not None:
            if all(character in self._alphabet for character in piece):
                return bytes(self._alphabet[character] for character in piece)
            return piece.encode("utf-8")  # an added token, which stands in plain characters
        return piece.replace(_WORD_START, " ").encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """Character → byte, of byte-level BPE (GPT-2): printable bytes are themselves, others follow 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


__all__ = ["TokenBytes"]
