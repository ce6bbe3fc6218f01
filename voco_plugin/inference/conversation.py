"""``Conversation``: what was said to a model, and the KV cache of what it has read of it.

:class:`~voco_plugin.inference.session.VoCoSession` is one; a
:class:`~voco_plugin.inference.streaming.stream.VideoStream` asks its questions within one.

Shapes: ``S`` slots of the KV cache, VoCo tokens and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..cache import VoCoCache
from ..core.attachment import attachment, input_device, is_attached
from ..core.forward import cache_of
from ..core.layout import tokenizer_of
from .prompts import adds_special_tokens, render, stream_ids_in_pieces, with_counts

_MARK = "\ue000"  # private use: in no prompt, so that a turn's end can be found in the rendered text
_DECIDED = {
    "inputs", "input_ids", "attention_mask", "voco_cache", "prefix_cache", "return_dict_in_generate",
    "use_cache", "past_key_values", "cache",
}  # fmt: skip
_ONE_ANSWER = ("num_beams", "num_return_sequences")


def said(answer: str) -> dict[str, Any]:
    """An assistant's turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


class Video(Protocol):
    """A video in a conversation: while it is there, questions go to it."""

    def ask(self, question: str, *, max_new_tokens: int = 64, **generate: Any) -> str: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Conversation:
    """The state of a conversation, and how its next turns are read.

    Args:
        model: an attached model, in evaluation mode.
        processor: its processor, with a chat template.
        num_tokens: K of the images given as images; ``None`` takes the model's.

    Attributes:
        messages: the conversation so far, as chat messages; images are named by their places only.

    Raises:
        ValueError: the model is not attached.
    """

    def __init__(self, model: Any, processor: Any, num_tokens: int | None = None) -> None:
        if not is_attached(model):
            raise ValueError("a session needs a model with VoCo attached; load it with voco_plugin.load.")
        self.model, self.processor, self.num_tokens = model, processor, num_tokens
        self.messages: list[dict[str, Any]] = []
        self._waiting: tuple[VoCoCache, ...] = ()  # images for the next question
        self._past: Any = None  # a DynamicCache: what has been read; never written to, so that forks share it
        self._unread: tuple[int, ...] = ()  # ids of the conversation that are not in it yet
        self._video: Video | None = None  # stands behind what has been read

    def _answered(
        self,
        turns: Sequence[dict[str, Any]],
        blocks: VoCoCache,
        max_new_tokens: int,
        generate: dict[str, Any],
        base: Sequence[dict[str, Any]] | None = None,
        known: dict[str, list[int]] | None = None,
    ) -> tuple[str, Any, tuple[int, ...]]:
        """The answer to the last of ``turns``, which follow what has been read; the KV cache behind it; and
        the ids of the answer that are not in it. The session stays as it is.

        Args:
            blocks: the images of ``turns``, in order.
            base: the messages that have been read; ``None``: all of the session's.
            known: see :func:`~voco_plugin.inference.prompts.stream_ids_in_pieces`.
        """
        text, special = self._text_of(turns, self.messages if base is None else base)
        voco = attachment(self.model).vocab.voco_id
        stream = stream_ids_in_pieces(self.model, self.processor, text, len(blocks), special, known)
        device = input_device(self.model)
        ids = torch.tensor([[*self._unread, *with_counts(stream, blocks.num_tokens, voco)]], device=device)
        before = 0 if self._past is None else self._past.get_seq_length()
        generate.setdefault("do_sample", False)
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), voco_cache=blocks.to(device),
            prefix_cache=self._past, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **generate,
        )  # fmt: skip
        new = output.sequences[0, ids.shape[1] :].tolist()
        answer = self._decode(new)
        while new and new[-1] in self._end_ids(generate):
            new.pop()  # how a turn ends is the chat template's to write
        past = cache_of(output)
        extra = past.get_seq_length() - before - ids.shape[1] - len(new)
        if extra > 0:
            past.crop(-extra)
        return answer, past, tuple(new[len(new) + extra :] if extra < 0 else ())

    def _text_of(self, turns: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> tuple[str, bool]:
        """What the chat template writes for ``turns`` and the head of an answer, after ``base``, which has
        been read; and whether the tokenizer is to add its own special tokens (at the very start only).
        """
        if self._past is None:
            text = render(self.processor, [[*base, *turns]])[0]
            return text, adds_special_tokens(self.processor, [text])
        whole = render(self.processor, [[*base[:-1], said(_MARK), *turns]])[0]
        before, mark, text = whole.rpartition(_MARK)
        if not mark or before.count(_MARK):
            raise ValueError(
                "this processor's chat template does not write an answer where it stands in the "
                "conversation, so a session cannot go on from it; ask each question with "
                "voco_plugin.inference.answering.answer."
            )
        return text, False

    def _decode(self, ids: Sequence[int]) -> str:
        return tokenizer_of(self.processor).decode(ids, skip_special_tokens=True).strip()

    def _end_ids(self, generate: dict[str, Any]) -> set[int]:
        ends = generate.get("eos_token_id")
        if ends is None:
            ends = getattr(self.model.generation_config, "eos_token_id", None)
        listed = ends if isinstance(ends, (list, tuple)) else [ends]
        return {e for e in (*listed, tokenizer_of(self.processor).eos_token_id) if isinstance(e, int)}

    @staticmethod
    def _check_options(generate: dict[str, Any]) -> None:
        decided = sorted(_DECIDED & generate.keys())
        if decided:
            raise ValueError(
                f"{decided[0]} is the session's to decide (it goes on from what it has read, and gives the "
                "answer as text); leave it out, or call model.generate yourself."
            )
        config = generate.get("generation_config")
        for name in _ONE_ANSWER:
            value = generate.get(name, getattr(config, name, None))
            if value is not None and value > 1:
                raise ValueError(f"{name}={value}: a session goes on from one answer; use 1, or fork it.")
        kind = generate.get("cache_implementation", getattr(config, "cache_implementation", None))
        if kind not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation={kind!r} cannot grow with a conversation; leave it out, or use "
                "model.generate(…, prefix_cache=…)."
            )
