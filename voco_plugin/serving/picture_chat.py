"""``PictureChat``: one person's conversation about images with a model, and what each step of it cost.

chat = PictureChat(model, processor)
chat.show(image)                       # stage 1: compressed once; an Added
for text in chat.ask("What is it?"):   # stage 2: the answer as it grows; then chat.last, an Answered
    ...
chat.ask("And where?")                 # the image is not compressed again
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..cache import VoCoBlock, VoCoCache
from ..core.attachment import attachment, evaluating
from ..core.layout import SequenceLayout, tokenizer_of
from ..inference.answering import compress_images, prompt
from ..inference.prompts import ask as user_turn
from ..inference.prompts import encode
from ..inference.session import VoCoSession
from .token_stream import TokenStream

MASK_TOKENS = 1024
"""No picture is drawn of the mask of a longer prompt: a token would be less than a pixel."""


@dataclass(frozen=True)
class Added:
    """What compressing an image, or the frames of a video, came to.

    Attributes:
        name: what the page calls it.
        blocks: one for an image, one a frame for a video.
        num_tokens: VoCo tokens of all blocks.
        nbytes: of their keys and values.
        vision_tokens: that they stand for.
        vision_nbytes: what keys and values of those would take, in the same dtype.
        seconds: image processor, tower and stage 1.
    """

    name: str
    blocks: int
    num_tokens: int
    nbytes: int
    vision_tokens: int
    vision_nbytes: int
    seconds: float


@dataclass(frozen=True)
class Answered:
    """What an answer came to.

    Attributes:
        text: the answer.
        first_token_seconds: from the question to its first token; ``None`` where none came.
        seconds: to its last.
        slots: of the KV cache behind it, text and VoCo or vision tokens; 0 where it was not counted.
    """

    text: str
    first_token_seconds: float | None
    seconds: float
    slots: int = 0


def _added(name: str, blocks: Sequence[VoCoBlock], seconds: float) -> Added:
    size = [VoCoCache([block]).nbytes for block in blocks]
    whole = [n * b.num_vision // b.num_tokens for n, b in zip(size, blocks, strict=True)]
    return Added(
        name, len(blocks), sum(b.num_tokens for b in blocks), sum(size),
        sum(b.num_vision for b in blocks), sum(whole), seconds,
    )  # fmt: skip


class PictureChat:
    """A conversation about images or one video, with costs; a thin layer over
    :class:`~voco_plugin.inference.session.VoCoSession`.

    Args:
        model: attached, in evaluation mode.
        processor: its processor, with a chat template.
        num_tokens: K of new images; ``None`` takes the model's.
        max_new_tokens: of an answer at most.
        lock: held while the model works; several chats with one model share it.

    Attributes:
        added: what was shown so far, in order.
        turns: questions and answers so far.
        last: what the latest whole answer came to.

    Raises:
        ValueError: the model is not attached.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        num_tokens: int | None = None,
        max_new_tokens: int = 64,
        lock: threading.Lock | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.num_tokens, self.max_new_tokens = num_tokens, max_new_tokens
        self.lock = lock or threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget images and turns."""
        self.session = VoCoSession(self.model, self.processor)
        self.added: list[Added] = []
        self.turns: list[tuple[str, str]] = []
        self.last: Answered | None = None
        self._images: list[Any] = []
        self._images_at: list[int] = []  # the turn that each image came before

    # -- what is asked about

    def show(self, image: Any, name: str | None = None) -> Added:
        """Compress a PIL image for the next question, behind what was shown before.

        Raises:
            BadImageError: the image processor does not take it.
            ValueError: a video is being watched.
        """
        if self.added and not self._images:
            raise ValueError("this conversation is about a video: clear() it before an image is shown.")
        name = name or f"image {len(self.added) + 1}"
        with self.lock, evaluating(self.model):
            start = time.perf_counter()
            (cache,) = compress_images(self.model, self.processor, [image], num_tokens=self.num_tokens)
            seconds = time.perf_counter() - start
            self.session.add(cache)
        added = _added(name, cache.blocks, seconds)
        self.added.append(added)
        self._images.append(image)
        self._images_at.append(len(self.turns))
        return added

    def watch(self, source: Any, *, frames: int = 16, name: str = "video") -> Added:
        """Compress ``frames`` frames of a video, evenly spread; the conversation begins anew.

        Args:
            source: what :func:`~voco_plugin.video.reading.read_video` takes.

        Raises:
            ValueError: no frame came of it.
        """
        self.clear()
        with self.lock, evaluating(self.model):
            self.session.num_tokens = self.num_tokens
            start = time.perf_counter()
            try:
                stream = self.session.watch(source, count=frames).run()
                blocks = [block for kept in stream.kept for block in kept.cache.blocks]
            except BaseException:
                self.clear()  # no half-read video stays
                raise
            seconds = time.perf_counter() - start
        if not blocks:
            self.clear()
            raise ValueError(f"{name} gives no frame.")
        self.added = [_added(name, blocks, seconds)]
        return self.added[0]

    # -- questions

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer as it grows, from what is cached. Leaving it early ends it: what was said stays.

        Raises:
            ValueError: the question is empty.
        """
        question = _checked(question)
        with self.lock, evaluating(self.model):
            stream = TokenStream(
                tokenizer_of(self.processor),
                partial(self.session.ask, question, max_new_tokens=self.max_new_tokens),
            )
            try:
                yield from stream
            finally:
                if stream.result is not None:
                    self._remember(question, stream)

    def _remember(self, question: str, stream: TokenStream) -> None:
        self.turns.append((question, stream.result))
        self.last = Answered(
            stream.result, stream.first_token_seconds, stream.seconds, self.session.num_slots
        )

    def uncompressed(self, plain: Callable[[], Any]) -> Iterator[str | Answered]:
        """The latest question again, of a model without VoCo on every vision token: the text as it grows,
        last an :class:`Answered`. The turns before it are those of this conversation.

        Args:
            plain: gives that model; called under the lock.

        Raises:
            ValueError: nothing was asked, of a video, or an image came after the first question.
        """
        if not self.turns:
            raise ValueError("ask a question first: the uncompressed model answers the same one.")
        if not self._images or any(self._images_at):
            raise ValueError("only images shown before the first question can be read uncompressed.")
        (*before, (question, _)) = self.turns
        with self.lock:
            model = plain()
            with evaluating(model):
                start = time.perf_counter()
                inputs = prompt(model, self.processor, [question], [self._images], before=[before])
                reading = time.perf_counter() - start
                length = inputs["input_ids"].shape[1]
                stream = TokenStream(
                    tokenizer_of(self.processor),
                    partial(model.generate, **inputs, max_new_tokens=self.max_new_tokens, do_sample=False),
                )
                text = ""
                for text in stream:
                    yield text
        first = stream.first_token_seconds
        yield Answered(text, None if first is None else reading + first, reading + stream.seconds, length)

    # -- pictures of it

    def draw_mask(self, path: str | Path) -> Path | None:
        """The mask of the images shown and the latest question as a PNG; ``None`` where there is no image,
        or the prompt is longer than :data:`MASK_TOKENS`."""
        if not self._images:
            return None
        from ..evaluation.reporting.mask import draw_mask_png

        state = attachment(self.model)
        question = self.turns[-1][0] if self.turns else ""
        inputs = encode(self.processor, [user_turn(question, len(self._images))], [self._images])
        inputs = self.model.insert_voco_tokens(
            inputs, num_tokens=self.num_tokens, padding_side="left", images_per_row=[len(self._images)]
        )
        layout = SequenceLayout.from_ids(inputs["input_ids"], inputs["attention_mask"], state.vocab)
        if layout.num_tokens > MASK_TOKENS:
            return None
        return draw_mask_png(state.config, layout, path)

    def read_by_answer(self) -> list[tuple[str, int]]:
        """What the latest answer could see: each block by name, with its VoCo tokens, then the text."""
        blocks = [(added.name, added.num_tokens) for added in self.added]
        if self.last is None:
            return blocks
        return [*blocks, ("text", max(0, self.last.slots - sum(tokens for _, tokens in blocks)))]


def _checked(question: str) -> str:
    if not question or not question.strip():
        raise ValueError("the question is empty: write one.")
    return question.strip()


__all__ = ["MASK_TOKENS", "Added", "Answered", "PictureChat"]
