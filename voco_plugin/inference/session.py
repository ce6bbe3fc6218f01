"""``VoCoSession``: a conversation over compressed images that is read once, token by token, and never again.

session = VoCoSession(model, processor)
session.add(first, second)                   # images, or caches of them
session.ask("What has changed?")             # reads [block, block, question], answers
session.ask("Where?")                        # reads the new turn only
other = session.fork()                       # two ways on from here; nothing is copied or read again

KV cache    [C C | text | answer] [text | answer] …      turn after turn; it only grows
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._compat import cache_of
from ..cache import VoCoCache
from ..core.attachment import attachment, is_attached
from .answering import compress_images
from .prompts import ask as user_turn
from .prompts import render, stream_ids_in_pieces, with_counts

if TYPE_CHECKING:
    from .streaming.stream import Watching

_MARK = "\ue000"  # private use: in no prompt, so that a turn's end can be found in the rendered text
_ONE_ANSWER = ("num_beams", "num_return_sequences")


def said(answer: str) -> dict[str, Any]:
    """An assistant's turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


class VoCoSession:
    """A conversation of one user with one attached model.

    A turn is read under the rule behind everything before it, so the answers are those of one pass over the
    whole conversation, each answer as its tokens were generated.

    Args:
        model: an attached model, in evaluation mode.
        processor: its processor, with a chat template.
        system: the system turn, if any.
        store: a :class:`~voco_plugin.store.store.VoCoCacheStore`: images that it holds are not compressed
            again, new ones are put into it.
        num_tokens: K of the images given as images; ``None`` takes the model's.

    Attributes:
        messages: the conversation so far, as chat messages; images are named by their places only.

    Raises:
        ValueError: the model is not attached.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        system: str | None = None,
        store: Any = None,
        num_tokens: int | None = None,
    ) -> None:
        if not is_attached(model):
            raise ValueError("a session needs a model with VoCo attached; load it with voco_plugin.load.")
        self.model, self.processor, self.store, self.num_tokens = model, processor, store, num_tokens
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        self._waiting: tuple[VoCoCache, ...] = ()
        self._past: Any = None  # a DynamicCache: what has been read; never written to, so that forks share it
        self._unread: tuple[int, ...] = ()  # ids of the conversation that are not in it yet
        self._watching: Watching | None = None  # the video that stands behind what has been read

    # -- the conversation

    def add(self, *images: Any) -> VoCoSession:
        """Images (PIL) or caches of them, in order, for the next question; the session itself.

        Raises:
            ValueError: a cache of several rows.
            BadImageError: the image processor does not take an image.
        """
        new: list[VoCoCache] = []
        for image in images:
            if isinstance(image, VoCoCache):
                if image.num_rows != 1:
                    raise ValueError(f"this cache holds {image.num_rows} rows; add one row: cache.row(i).")
                new.append(image)
            else:
                new.append(self._compressed(image))
        self._waiting += tuple(new)
        return self

    def ask(self, question: str, *, max_new_tokens: int = 64, **generate: Any) -> str:
        """The answer to ``question``, which stands after the images added since the last one.

        Args:
            generate: passed to ``model.generate`` (sampling, stop strings, an assistant model, a streamer …).

        Raises:
            ValueError: beams, several answers or a static cache: a session goes on from one answer.
        """
        self._check_options(generate)
        if self._watching is not None:
            return self._watching.ask(question, max_new_tokens=max_new_tokens, **generate)
        waiting = VoCoCache.cat(self._waiting)
        (turn,) = user_turn(question, len(waiting))
        answer, past, unread = self._answered([turn], waiting, max_new_tokens, generate)
        # nothing of the session changes before all of this has worked
        self._past, self._unread, self._waiting = past, unread, ()
        self.messages += [turn, said(answer)]
        return answer

    def watch(self, source: Any = None, **options: Any) -> Watching:
        """A video that is watched while questions are asked:
        :class:`~voco_plugin.inference.streaming.stream.Watching`, which says the options. It keeps a block a
        frame, within a budget; :meth:`ask` then asks about what has been seen so far.

        Args:
            source: a video file, folder or camera as :func:`~voco_plugin.video.reading.read_video` takes it,
                or an iterable of frames; ``None``: frames are given to ``feed``.

        Raises:
            ValueError: another video is being watched, or an option cannot be kept.
        """
        from .streaming.stream import Watching

        return Watching(self, source, **options)

    def fork(self) -> VoCoSession:
        """A second session in the same state. Nothing is copied: what has been read is never written to.

        Raises:
            ValueError: a video is being watched.
        """
        self._check_no_video("forked")
        other = VoCoSession(self.model, self.processor, store=self.store, num_tokens=self.num_tokens)
        other.messages = list(self.messages)
        other._waiting, other._past, other._unread = self._waiting, self._past, self._unread
        return other

    # -- what it holds

    @property
    def num_images(self) -> int:
        """Images so far, those waiting for the next question included."""
        asked = sum(part["type"] == "image" for turn in self.messages for part in turn["content"])
        video = 0 if self._watching is None else len(self._watching.kept)
        return asked + video + sum(len(cache) for cache in self._waiting)

    @property
    def num_slots(self) -> int:
        """Slots of the KV cache: VoCo tokens and text that have been read."""
        return 0 if self._past is None else self._past.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, those of waiting images included."""
        held = 0 if self._past is None else sum(x.keys.nbytes + x.values.nbytes for x in self._past.layers)
        video = 0 if self._watching is None else self._watching.nbytes
        return held + video + sum(cache.nbytes for cache in self._waiting)

    def _check_no_video(self, what: str) -> None:
        if self._watching is not None:
            raise ValueError(
                f"a session is not {what} while it watches a video, whose blocks are not read for good yet; "
                "close() the watching and ask once more first."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation and its KV cache; whole or not at all. The model is not in the file.

        Raises:
            ValueError: a video is being watched.
        """
        self._check_no_video("saved")
        from .session_file import write_session

        write_session(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any, processor: Any, *, store: Any = None) -> VoCoSession:
        """A session as it was saved: the next answer is the same, bit for bit.

        Raises:
            VoCoCacheError: no session file, changed since, or of another model or rule.
            FileNotFoundError: there is no such file.
        """
        from .session_file import read_session

        session = cls(model, processor, store=store)
        read_session(path, session)
        return session

    # -- inside

    def _compressed(self, image: Any) -> VoCoCache:
        if self.store is None:
            (cache,) = compress_images(self.model, self.processor, [image], num_tokens=self.num_tokens)
            return cache
        key = self.store.key_of(image, self.num_tokens)
        if key not in self.store:
            (cache,) = compress_images(self.model, self.processor, [image], num_tokens=self.num_tokens)
            self.store.put(key, cache)
        return self.store.get(key)

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
        device = self.model.device
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
            bos = getattr(getattr(self.processor, "tokenizer", self.processor), "bos_token", None)
            return text, not (bos and text.startswith(bos))
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
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _end_ids(self, generate: dict[str, Any]) -> set[int]:
        ends = generate.get("eos_token_id")
        if ends is None:
            ends = getattr(self.model.generation_config, "eos_token_id", None)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        listed = ends if isinstance(ends, (list, tuple)) else [ends]
        return {e for e in (*listed, tokenizer.eos_token_id) if isinstance(e, int)}

    @staticmethod
    def _check_options(generate: dict[str, Any]) -> None:
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

    def __repr__(self) -> str:
        turns = sum(turn["role"] == "user" for turn in self.messages)
        return f"VoCoSession({turns} turns, {self.num_images} images, {self.nbytes / 1e6:.3f} MB)"


__all__ = ["VoCoSession"]
