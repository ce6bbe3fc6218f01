"""Tokens one by one → their text piece by piece.

A character may take several tokens, and what a token reads as may depend on those before it. A piece comes
out once it is settled; the pieces together are what decoding all tokens at once gives. (Not so where bytes
that are no text follow whole characters written as bytes: SentencePiece then takes those back as well, and
here they stay.)
"""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"


class TextPieces:
    """The text of one answer as it grows. Special tokens are left out, as in every answer of the package.

    Args:
        tokenizer: used by nobody else at the time; a fast one goes through ``DecodeStream``, any other
            through its ``decode``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._ids: list[int] = []
        self._given = ""
        self._prefix = self._read = 0  # of _ids: where the context of the next piece begins and ends
        self._stream = _decode_stream() if self._backend is not None else None
        self._gave_up = False

    def feed(self, token: int) -> str:
        """The text that ``token`` settles; empty in the middle of a character."""
        self._ids.append(token)
        piece = self._streamed(token) if self._stream is not None else self._decoded()
        self._given += piece
        return piece

    def rest(self) -> str:
        """What has not been given once no token will come: half a character reads as ``\ufffd``."""
        rest = self._behind_given(self._text(self._ids))
        self._given += rest
        return rest

    def _streamed(self, token: int) -> str:
        if not self._gave_up:
            try:
                return self._stream.step(self._backend, token) or ""  # type: ignore[union-attr]
            except Exception:  # bytes that are no text ("Invalid prefix encountered")
                self._gave_up = True
        whole = self._text(self._ids)
        return "" if whole.endswith(_UNFINISHED) else self._behind_given(whole)

    def _behind_given(self, whole: str) -> str:
        return whole[len(self._given) :] if whole.startswith(self._given) else ""

    def _decoded(self) -> str:
        """By prefix: the tokens since the last settled one, read behind a few settled ones."""
        before = self._text(self._ids[self._prefix : self._read])
        now = self._text(self._ids[self._prefix :])
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _decode_stream() -> Any:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(skip_special_tokens=True)


__all__ = ["TextPieces"]
