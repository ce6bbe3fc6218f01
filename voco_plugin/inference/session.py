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
from typing import Any

from ..cache import VoCoCache
from ..cache.fingerprint import blocks_made_by, made_by
from ..core.attachment import attachment, input_device
from .answering import compress_images
from .conversation import Conversation, said
from .prompts import ask as user_turn
from .session_file import SavedSession, read_session, write_session
from .streaming.stream import VideoStream


class VoCoSession(Conversation):
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
        super().__init__(model, processor, num_tokens)
        self.store = store
        if system is not None:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": system}]})

    # -- the conversation

    def add(self, *images: Any) -> VoCoSession:
        """Take ``images`` (PIL) or caches of them, in order, for the next question; the session itself.

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
            max_new_tokens: of this answer at most.
            generate: passed to ``model.generate`` (sampling, stop strings, an assistant model, a streamer …).

        Raises:
            ValueError: beams, several answers or a static cache: a session goes on from one answer.
        """
        self._check_options(generate)
        if self._video is not None:
            return self._video.ask(question, max_new_tokens=max_new_tokens, **generate)
        waiting = VoCoCache.cat(self._waiting)
        (turn,) = user_turn(question, len(waiting))
        answer, past, unread = self._answered([turn], waiting, max_new_tokens, generate)
        # nothing of the session changes before all of this has worked
        self._past, self._unread, self._waiting = past, unread, ()
        self.messages += [turn, said(answer)]
        return answer

    def watch(self, source: Any = None, **options: Any) -> VideoStream:
        """A video that is watched while questions are asked. It keeps a block a frame, within a budget;
        :meth:`ask` then asks about what has been seen so far. The options are those of
        :class:`~voco_plugin.inference.streaming.stream.VideoStream`.

        Args:
            source: a video file, folder or camera as :func:`~voco_plugin.video.reading.read_video` takes it,
                or an iterable of frames; ``None``: frames are given to ``feed``.

        Raises:
            ValueError: another video is being watched, or an option is not valid.
        """
        return VideoStream(self, source, **options)

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
        video = 0 if self._video is None else self._video.num_blocks
        return asked + video + sum(len(cache) for cache in self._waiting)

    @property
    def num_slots(self) -> int:
        """Slots of the KV cache: VoCo tokens and text that have been read."""
        return 0 if self._past is None else self._past.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, those of waiting images included."""
        read = 0 if self._past is None else sum(x.keys.nbytes + x.values.nbytes for x in self._past.layers)
        video = 0 if self._video is None else self._video.nbytes
        return read + video + sum(cache.nbytes for cache in self._waiting)

    def _check_no_video(self, what: str) -> None:
        if self._video is not None:
            raise ValueError(
                f"a session is not {what} while it watches a video, whose blocks are not read for good yet; "
                "close() it and ask once more first."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation and its KV cache to ``path``; whole or not at all. The model is not in it.

        Raises:
            ValueError: a video is being watched.
        """
        self._check_no_video("saved")
        saved = SavedSession(
            self.messages, self.num_tokens, self._past, self._unread, VoCoCache.cat(self._waiting).blocks
        )
        write_session(path, saved, made_by(self.model, attachment(self.model)))

    @classmethod
    def load(cls, path: str | os.PathLike, model: Any, processor: Any, *, store: Any = None) -> VoCoSession:
        """A session as it was saved: the next answer is the same, bit for bit.

        Args:
            path: what :meth:`save` wrote.
            model: the attached model that the session was held with.
            processor: its processor.
            store: as in the constructor.

        Raises:
            VoCoCacheError: no session file, changed since, or of another model or rule.
            FileNotFoundError: there is no such file.
        """
        session = cls(model, processor, store=store)
        saved = read_session(path, made_by(model, attachment(model)), input_device(model))
        session.messages, session.num_tokens = saved.messages, saved.num_tokens
        session._past, session._unread = saved.past, saved.unread
        if saved.waiting:
            compressed_by = blocks_made_by(model, attachment(model))
            session._waiting = (VoCoCache(saved.waiting, fingerprint=compressed_by),)
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

    def __repr__(self) -> str:
        turns = sum(turn["role"] == "user" for turn in self.messages)
        return f"VoCoSession({turns} turns, {self.num_images} images, {self.nbytes / 1e6:.3f} MB)"


__all__ = ["VoCoSession"]
