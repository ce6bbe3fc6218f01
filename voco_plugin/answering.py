"""Questions in words → answers in words: with the image in the prompt, from a cache, or with no image at all.

What `voco compress`, `voco generate` and `voco eval` stand on. Everything is batched; rows are padded on the
left.

Shapes: ``B`` prompts of a batch, ``K`` VoCo tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from .cache import VoCoCache
from .images import BadImageError, find_refused
from .injection import insert_voco_tokens
from .layout import SequenceLayout
from .modeling import attachment, is_attached

Messages = list[dict[str, Any]]
Tick = Callable[[int], Any]

_BLANK = (56, 56)
_MARK = "\ue001"  # private use: in no prompt


def ask(question: str, num_images: int = 1, times: Sequence[str | None] | None = None) -> Messages:
    """One user turn: the images, then the question.

    Args:
        times: per image the time text before it, or ``None``.

    Raises:
        ValueError: not as many times as images.
    """
    if times is not None and len(times) != num_images:
        raise ValueError(f"{len(times)} times for {num_images} images; give one for each, or None.")
    content: list[dict[str, Any]] = []
    for number in range(num_images):
        if times is not None and times[number] is not None:
            content.append({"type": "text", "text": times[number]})
        content.append({"type": "image"})
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def encode(
    processor: Any, batch: Sequence[Messages], images: Sequence[Sequence[Any]] | None
) -> dict[str, Any]:
    """A processor's output for ``B`` conversations, ready for generation: ``input_ids`` ``(B, N)`` and the
    rest.

    Args:
        images: per conversation its images in order; ``None`` where there are none at all.

    Raises:
        ValueError: the processor has no chat template.
    """
    texts = render(processor, batch)
    return _tokenized(processor, texts, images, _adds_special_tokens(processor, texts))


def _tokenized(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]] | None, special: bool
) -> dict[str, Any]:
    more = {} if images is None else {"images": [list(row) for row in images]}
    out = processor(
        text=list(texts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special,
        **more,
    )  # fmt: skip
    return dict(out)


def render(processor: Any, batch: Sequence[Messages]) -> list[str]:
    """The chat template's text of each conversation, up to where the answer begins."""
    template = getattr(processor, "chat_template", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "this processor has no chat template; save one with it (processor.chat_template = …)."
        )
    renderer = processor if template is not None else tokenizer
    return renderer.apply_chat_template(list(batch), tokenize=False, add_generation_prompt=True)


def _adds_special_tokens(processor: Any, texts: Sequence[str]) -> bool:
    """No second BOS where the template has written one already."""
    bos = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    return not (bos and texts and texts[0].startswith(bos))


def stream_of(
    model: Any, processor: Any, batch: Sequence[Messages], cache: VoCoCache
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of the compressed stream of ``B`` conversations, made without
    their images.

    The processor runs on a blank image in each place: what it writes around an image (line breaks, markers)
    is its own affair, and only the text that stays in the stream is kept. Row ``b`` gets the K of each block
    that ``cache`` holds for it.
    """
    places = [sum(part.get("type") == "image" for turn in talk for part in _parts(turn)) for talk in batch]
    texts = render(processor, batch)
    return stream_of_texts(model, processor, texts, places, cache, _adds_special_tokens(processor, texts))


def stream_of_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    places: Sequence[int],
    cache: VoCoCache,
    special: bool = False,
) -> dict[str, torch.Tensor]:
    """As :func:`stream_of`, of texts that a chat template has rendered already.

    Args:
        places: how many images each text has.
        special: whether the tokenizer puts its own special tokens around them.
    """
    vocab = attachment(model).vocab
    pad = getattr(processor, "tokenizer", processor).pad_token_id or 0
    rows = []
    for number, ids in enumerate(stream_ids(model, processor, texts, places, special)):
        counts = [b.num_tokens for b, row in zip(cache, cache.rows, strict=True) if row == number]
        if places[number] != len(counts):
            raise ValueError(
                f"prompt {number} has {places[number]} image(s) and {len(counts)} cached image(s)."
            )
        rows.append(with_counts(ids, counts, vocab.voco_id))
    longest = max(map(len, rows))
    out = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": out, "attention_mask": mask}


def stream_ids(
    model: Any, processor: Any, texts: Sequence[str], places: Sequence[int], special: bool = False
) -> list[list[int]]:
    """Per text the ids of its compressed stream, with one VoCo token for each image; arguments as in
    :func:`stream_of_texts`.
    """
    vocab = attachment(model).vocab
    blank = Image.new("RGB", _BLANK)
    blanks = [[blank] * count for count in places] if any(places) else None
    encoded = insert_voco_tokens(
        _tokenized(processor, texts, blanks, special),
        vocab,
        1,
        pad_token_id=getattr(processor, "tokenizer", processor).pad_token_id or 0,
        padding_side="left",
        images_per_row=list(places),
    )
    layout = SequenceLayout.from_ids(encoded["input_ids"], encoded["attention_mask"], vocab)
    return [ids[keep].tolist() for ids, keep in zip(encoded["input_ids"], layout.in_stream, strict=True)]


def with_counts(ids: Sequence[int], counts: Sequence[int], voco_id: int) -> list[int]:
    """``ids`` with the i-th VoCo token repeated ``counts[i]`` times."""
    following = iter(counts)
    stream: list[int] = []
    for token in ids:
        stream += [token] * next(following) if token == voco_id else [token]
    return stream


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """The typed parts of a turn; none where its content is a plain string."""
    return turn["content"] if isinstance(turn["content"], list) else []


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
    """Each image compressed alone (paper, Sec. 3.3, stage 1): a cache of one block, in order.

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
        ValueError: ``max_memory`` is below what one image takes.
    """
    before = 0
    for whole in _chunks(images, batch_size):
        chunk, inputs = _encode_images(processor, whole, before, refused)
        before += len(whole)
        if not chunk:
            continue
        inputs = model.insert_voco_tokens(inputs, num_tokens=num_tokens)
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

    def encoded(kept: list[Any]) -> dict[str, Any]:
        return encode(processor, [ask("") for _ in kept], [[image] for image in kept]) if kept else {}

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
    kept = [image for number, image in enumerate(images) if number not in bad]
    return kept, encoded(kept)


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    *,
    images: Sequence[Sequence[Any]] | None = None,
    caches: Sequence[VoCoCache] | None = None,
    times: Sequence[Sequence[str | None]] | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    tick: Tick | None = None,
    **generate: Any,
) -> list[str]:
    """The model's answers, greedy unless ``generate`` says otherwise.

    Args:
        questions: ``Q`` questions, each asked alone.
        images: per question its images. An attached model compresses them, a plain one reads every vision
            token.
        caches: instead of images: per question the cache of its images, which are not opened again.
        times: per question the time text before each image (frames of a video), or ``None``.
        generate: passed to ``model.generate``.

    Raises:
        ValueError: images and caches are both given, their number is not that of the questions, a plain
            model is to answer from a cache, or the chat template does not keep times before their images.
    """
    if images is not None and caches is not None:
        raise ValueError("give images or caches, not both.")
    for name, given in (("images", images), ("caches", caches), ("times", times)):
        if given is not None and len(given) != len(questions):
            raise ValueError(
                f"{len(given)} {name} for {len(questions)} questions; give one entry per question."
            )
    if caches is not None and not is_attached(model):
        raise ValueError(
            "a model without VoCo attached cannot answer from a cache; load it with voco_plugin.load."
        )
    if times is not None and any(when is not None for row in times for when in row):
        check_times(processor)
    generate.setdefault("do_sample", False)
    out: list[str] = []
    with evaluating(model):
        for start in range(0, len(questions), batch_size):
            part = slice(start, start + batch_size)
            shown = (_part(images, part), _part(caches, part), _part(times, part))
            inputs = prompt(model, processor, questions[part], *shown)
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **generate)
            fresh = ids[:, inputs["input_ids"].shape[1] :]
            out += [text.strip() for text in processor.batch_decode(fresh, skip_special_tokens=True)]
            if tick is not None:
                tick(len(questions[part]))
    return out


def prompt(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Sequence[Any]] | None = None,
    caches: Sequence[VoCoCache] | None = None,
    times: Sequence[Sequence[str | None]] | None = None,
) -> dict[str, Any]:
    """The arguments of ``model(...)`` or ``model.generate(...)`` for a batch of questions; see
    :func:`answer`."""
    if caches is not None:
        stacked = VoCoCache.stack(caches)
        batch = _asked(questions, caches, times)
        return on_device(model, {**stream_of(model, processor, batch, stacked), "voco_cache": stacked})
    if images is None:
        return on_device(model, encode(processor, [ask(q, 0) for q in questions], None))
    batch = _asked(questions, images, times)
    inputs = encode(processor, batch, images)
    return on_device(model, model.insert_voco_tokens(inputs) if is_attached(model) else inputs)


def check_times(processor: Any) -> None:
    """Refuse time texts under a chat template that does not write them before their frames.

    Raises:
        ValueError: it writes all images first, then all text.
    """
    if not keeps_order(processor):
        raise ValueError(
            "this processor's chat template writes all images before all text, so no time text stands before "
            "its frame; leave time texts out, or give a template that writes parts in order."
        )


def keeps_order(processor: Any) -> bool:
    """Whether the chat template writes texts and images of a turn in the order of its parts."""
    texts = [{"type": "text", "text": f"{_MARK}{n}"} for n in range(3)]
    content = [texts[0], {"type": "image"}, texts[1], {"type": "image"}, texts[2]]
    whole = render(processor, [[{"role": "user", "content": content}]])[0]
    at = [whole.find(f"{_MARK}{n}") for n in range(3)]
    between = [whole[a + 2 : b].strip() for a, b in zip(at[:-1], at[1:], strict=True)]
    return min(at) >= 0 and at == sorted(at) and bool(between[0]) and between[0] == between[1]


def _asked(questions: Sequence[str], shown: Sequence[Any], times: Any) -> list[Messages]:
    """Each question after its images (or cached ones)."""
    told = [None] * len(questions) if times is None else times
    return [ask(q, len(row), when) for q, row, when in zip(questions, shown, told, strict=True)]


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
    device, dtype = model.device, model.dtype
    return {
        key: value.to(device, dtype) if torch.is_tensor(value) and value.is_floating_point()
        else value.to(device) if torch.is_tensor(value) else value
        for key, value in inputs.items()
    }  # fmt: skip


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (a cache is the same whenever it is made), and back to what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
