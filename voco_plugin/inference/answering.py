"""Questions in words → answers in words: with the image in the prompt, from a cache, or with no image at all.

What `voco compress`, `voco generate` and `voco eval` stand on. Everything is batched; rows are padded on the
left.

Shapes: ``B`` prompts of a batch, ``K`` VoCo tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..cache import VoCoCache
from ..core.attachment import attachment, evaluating, input_device, is_attached
from ..data.images import BadImageError, find_refused
from .messages import check_per_prompt, conversations
from .prompts import Messages, ask, check_text_before, check_times, encode, stream_of

Tick = Callable[[int], Any]


@torch.no_grad()
def compress_images(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    *,
    num_tokens: int | None = None,
    batch_size: int = 8,
    max_memory: int | None = None,
    tick: Tick | None = None,
    refused: Callable[[int, str], Any] | None = None,
) -> Iterator[VoCoCache]:
    """Each image compressed by itself (paper, Sec. 3.3, stage 1): a cache of one block, in order.

    Args:
        images: PIL images; read as they are needed.
        num_tokens: K; ``None`` takes the model's.
        batch_size: images read and prepared at a time; those of one size run together.
        max_memory: bytes of working memory that one forward may take (``model.compress``); fewer images then
            run together.
        tick: called with the number of images just done.
        refused: called with the number of an image that the image processor does not take, and the reason;
            it is left out. ``None``: it raises.

    Raises:
        BadImageError: the image processor does not take an image.
        ValueError: ``max_memory`` is below what one image takes, or the model is not attached.
    """
    attachment(model)
    before = 0
    for whole in _chunks(images, batch_size):
        chunk, inputs = _encode_images(processor, whole, before, refused)
        before += len(whole)
        if not chunk:
            continue
        inputs = model.insert_voco_tokens(inputs, num_tokens=num_tokens, padding_side="left")
        cache = model.compress(**on_device(model, inputs), max_memory=max_memory)
        for row in range(len(chunk)):
            yield cache.row(row)
        if tick is not None:
            tick(len(chunk))


def _encode_images(
    processor: Any, images: list[Any], before: int, refused: Callable[[int, str], Any] | None
) -> tuple[list[Any], dict[str, Any]]:
    """The images that the processor takes, and its output for them, each in a prompt of its own.

    Args:
        before: images before these, for their numbers.
    """

    def encoded(usable: list[Any]) -> dict[str, Any]:
        return encode(processor, [ask("") for _ in usable], [[image] for image in usable]) if usable else {}

    try:
        return images, encoded(images)
    except Exception:
        bad = find_refused(getattr(processor, "image_processor", processor), images)
        if not bad:
            raise
    for number, reason in bad.items():
        if refused is None:
            raise BadImageError(f"image number {before + number + 1} cannot be used: {reason}.")
        refused(before + number, reason)
    usable = [image for number, image in enumerate(images) if number not in bad]
    return usable, encoded(usable)


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    questions: Sequence[str] | None = None,
    *,
    messages: Sequence[Messages] | None = None,
    images: Sequence[Sequence[Any]] | None = None,
    caches: Sequence[VoCoCache] | None = None,
    times: Sequence[Sequence[str | None]] | None = None,
    before: Sequence[Sequence[tuple[str, str]]] | None = None,
    text_before: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    tick: Tick | None = None,
    **generate: Any,
) -> list[str]:
    """The model's answers, greedy unless ``generate`` says otherwise.

    Args:
        processor: the model's own.
        questions: ``Q`` questions, each in a prompt of its own.
        messages: instead of questions: ``Q`` conversations, each a list of turns (``{"role": …, "content":
            …}``; several turns, a system turn) that ends with the user's. Images stand in the content
            (``{"type": "image", "image": …}``: PIL image, path, URL), or image parts without one take those
            of ``images`` in order; with ``caches`` each image part stands for the next block, and no image
            is opened.
        images: per question its images. An attached model compresses them, a plain one reads every vision
            token.
        caches: instead of images: per question the cache of its images, which are not opened again.
        times: per question the time text before each image (frames of a video), or ``None``.
        before: per question the questions and answers of its conversation that come first; the images stand
            before the first.
        text_before: stands before the images of every question.
        max_new_tokens: of an answer at most.
        batch_size: prompts that are read together.
        tick: called after each batch with the number of its answers (a progress bar).
        generate: passed to ``model.generate``.

    Raises:
        ValueError: images and caches are both given, their number is not that of the questions or of the
            image parts, a plain model is to answer from a cache, ``messages`` are no conversations, or the
            chat template does not keep times, the text before their images, or a system turn.
    """
    asked = _check_asked(questions, messages, times, before, text_before)
    what = "questions" if messages is None else "conversations"
    check_per_prompt(images, caches, len(asked), what)
    for name, given in (("times", times), ("before", before)):
        if given is not None and len(given) != len(asked):
            raise ValueError(f"{len(given)} {name} for {len(asked)} questions; give one entry per question.")
    if caches is not None and not is_attached(model):
        raise ValueError(
            "a model without VoCo attached cannot answer from a cache; load it with voco_plugin.load."
        )
    if times is not None and any(when is not None for row in times for when in row):
        check_times(processor)
    if text_before is not None and (images is not None or caches is not None):
        check_text_before(processor, text_before)
    talks: list[Messages] | None = None
    if messages is not None:
        talks, images = conversations(asked, images, caches, processor=processor)
    generate.setdefault("do_sample", False)
    out: list[str] = []
    with evaluating(model):
        for start in range(0, len(asked), batch_size):
            part = slice(start, start + batch_size)
            shown = (_part(images, part), _part(caches, part))
            if talks is not None:
                inputs = inputs_of(model, processor, talks[part], *shown)
            else:
                told = (_part(times, part), _part(before, part), text_before)
                inputs = prompt(model, processor, asked[part], *shown, *told)
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **generate)
            fresh = ids[:, inputs["input_ids"].shape[1] :]
            out += [text.strip() for text in processor.batch_decode(fresh, skip_special_tokens=True)]
            if tick is not None:
                tick(len(asked[part]))
    return out


def _check_asked(questions: Any, messages: Any, times: Any, before: Any, text_before: Any) -> Any:
    """Questions or conversations, whichever are given.

    Raises:
        ValueError: both or neither, one where a list of them is wanted, or what belongs to questions beside
            conversations.
    """
    if (questions is None) == (messages is None):
        raise ValueError("give questions or messages=, one of the two.")
    if messages is None:
        questions = questions if isinstance(questions, str) or hasattr(questions, "__len__") else [*questions]
        if isinstance(questions, str):
            raise ValueError("questions is one string; give a list of questions: [question].")
        odd = next((q for q in questions if not isinstance(q, str)), None)
        if odd is not None:
            raise ValueError(
                f"a question is a {type(odd).__name__}; give strings, or conversations as messages=."
            )
        return questions
    for name, given in (("times", times), ("before", before), ("text_before", text_before)):
        if given is not None:
            raise ValueError(f"{name} belongs to questions; write it into the conversations (messages=).")
    messages = messages if isinstance(messages, (str, dict)) else list(messages)
    if isinstance(messages, (str, dict)) or (messages and isinstance(messages[0], dict)):
        raise ValueError("messages is one conversation; give a list of conversations: [messages].")
    return messages


def prompt(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Sequence[Any]] | None = None,
    caches: Sequence[VoCoCache] | None = None,
    times: Sequence[Sequence[str | None]] | None = None,
    before: Sequence[Sequence[tuple[str, str]]] | None = None,
    text_before: str | None = None,
) -> dict[str, Any]:
    """The arguments of ``model(...)`` or ``model.generate(...)`` for a batch of questions; see
    :func:`answer`."""
    if caches is not None:
        batch = _asked(questions, caches, times, before, text_before)
    elif images is not None:
        batch = _asked(questions, images, times, before, text_before)
    else:
        batch = _asked(questions, [()] * len(questions), None, before, text_before)
    return inputs_of(model, processor, batch, images, caches)


def inputs_of(
    model: Any,
    processor: Any,
    batch: Sequence[Messages],
    images: Sequence[Sequence[Any]] | None = None,
    caches: Sequence[VoCoCache] | None = None,
) -> dict[str, Any]:
    """As :func:`prompt`, of conversations whose image parts are bare."""
    if caches is not None:
        stacked = VoCoCache.stack(caches)
        return on_device(model, {**stream_of(model, processor, batch, stacked), "voco_cache": stacked})
    if images is None or not any(len(row) for row in images):
        return on_device(model, encode(processor, batch, None))
    inputs = encode(processor, batch, images)
    if is_attached(model):
        counts = [len(row) for row in images]
        inputs = model.insert_voco_tokens(inputs, padding_side="left", images_per_row=counts)
    return on_device(model, inputs)


def _asked(
    questions: Sequence[str], shown: Sequence[Any], times: Any, before: Any, text_before: str | None
) -> list[Messages]:
    """Each question after its images (or cached ones) and the turns before it."""
    told = [None] * len(questions) if times is None else times
    turns = [()] * len(questions) if before is None else before
    return [
        ask(q, len(row), when, before=first, text_before=text_before)
        for q, row, when, first in zip(questions, shown, told, turns, strict=True)
    ]


def _part(items: Any, part: slice) -> Any:
    return None if items is None else items[part]


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def on_device(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` on the model's device, pixels in its dtype."""
    device, dtype = input_device(model), model.dtype
    return {
        key: value.to(device, dtype) if torch.is_tensor(value) and value.is_floating_point()
        else value.to(device) if torch.is_tensor(value) else value
        for key, value in inputs.items()
    }  # fmt: skip
