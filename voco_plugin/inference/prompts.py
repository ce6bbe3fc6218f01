"""A conversation in words → the token ids that a processor and its chat template make of it, with its images
or without. What stage 2 reads is written with a blank image in the place of each.

    messages   →  text (chat template)  →  ids (processor)  →  compressed stream: text and VoCo tokens

Shapes: ``B`` prompts of a batch, ``K`` VoCo tokens of a block.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..cache import VoCoCache
from ..core.attachment import attachment
from ..core.injection import insert_voco_tokens
from ..core.layout import SequenceLayout, pad_id_of, plain_processor, tokenizer_of

Messages = list[dict[str, Any]]

_BLANK = (56, 56)
_MARK = "\ue001"  # private use: in no prompt
_IMAGES_AT_ONCE = 32  # in a prompt that the processor runs on


def ask(
    question: str,
    num_images: int = 1,
    times: Sequence[str | None] | None = None,
    *,
    before: Sequence[tuple[str, str]] = (),
    text_before: str | None = None,
) -> Messages:
    """A user's turn, the images and then the question; or a conversation that ends with the question.

    Args:
        times: per image the time text before it, or ``None``.
        before: questions and answers that come first; the images then stand before the first of these.
        text_before: text that stands before the images.

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
    asked = [*(said for said, _ in before), question]
    if text_before is not None and content:
        content.insert(0, {"type": "text", "text": text_before})
    elif text_before is not None:  # nothing stands between the two but a line break
        asked[0] = f"{text_before}\n{asked[0]}"
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": asked[0]}]}]
    for (_, answer), following in zip(before, asked[1:], strict=True):
        for role, said in (("assistant", answer), ("user", following)):
            messages.append({"role": role, "content": [{"type": "text", "text": said}]})
    return messages


def encode(
    processor: Any, batch: Sequence[Messages], images: Sequence[Sequence[Any]] | None
) -> dict[str, Any]:
    """A processor's output for ``B`` conversations, ready for generation: ``input_ids`` ``(B, N)`` and the
    rest.

    Args:
        images: the images of each conversation, in order; ``None`` where there are none at all.

    Raises:
        ValueError: the processor has no chat template.
    """
    texts = render(processor, batch)
    return _tokenized(processor, texts, images, adds_special_tokens(processor, texts))


def _tokenized(
    processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]] | None, special: bool
) -> dict[str, Any]:
    more = {} if images is None else {"images": [list(row) for row in images]}
    return run_processor(processor, texts, add_special_tokens=special, **more)


def run_processor(processor: Any, texts: Sequence[str], **given: Any) -> dict[str, Any]:
    """The processor's output for ``texts`` and what is ``given`` with them (images, videos, options), padded
    on the left, as generation wants it. VoCo tokens are not in it, whatever the processor.
    """
    processor = plain_processor(processor)
    return dict(processor(text=list(texts), return_tensors="pt", padding=True, padding_side="left", **given))


def render(processor: Any, batch: Sequence[Messages]) -> list[str]:
    """The chat template's text of each conversation, up to where the answer begins."""
    template = getattr(processor, "chat_template", None)
    tokenizer = tokenizer_of(processor)
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "this processor has no chat template; save one with it (processor.chat_template = …)."
        )
    renderer = processor if template is not None else tokenizer
    return renderer.apply_chat_template(list(batch), tokenize=False, add_generation_prompt=True)


def adds_special_tokens(processor: Any, texts: Sequence[str]) -> bool:
    """Whether the tokenizer should add its special tokens: not where the template has written the BOS."""
    bos = getattr(tokenizer_of(processor), "bos_token", None)
    return not (bos and texts and texts[0].startswith(bos))


def stream_of(
    model: Any, processor: Any, batch: Sequence[Messages], cache: VoCoCache
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of the compressed stream of ``B`` conversations, made without
    their images.

    The processor runs on a blank image in the place of each. What it writes around an image (line breaks,
    markers) is up to it; only the text that stays in the stream is taken. Row ``b`` gets the K of each block
    that ``cache`` holds for it.

    Args:
        model: attached.
        processor: its processor.
        batch: ``B`` conversations, whose image parts are bare.
        cache: a row of blocks for each.
    """
    places = [sum(part.get("type") == "image" for turn in talk for part in _parts(turn)) for talk in batch]
    texts = render(processor, batch)
    return stream_of_texts(model, processor, texts, places, cache, adds_special_tokens(processor, texts))


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
    pad = pad_id_of(processor)
    rows = []
    for number, ids in enumerate(_streams(model, processor, texts, places, special)):
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


def _streams(
    model: Any, processor: Any, texts: Sequence[str], places: Sequence[int], special: bool
) -> list[list[int]]:
    if max(places, default=0) <= _IMAGES_AT_ONCE:
        return stream_ids(model, processor, texts, places, special)
    known: dict[str, list[int]] = {}
    return [
        stream_ids_in_pieces(model, processor, text, count, special, known)
        for text, count in zip(texts, places, strict=True)
    ]


def stream_ids(
    model: Any, processor: Any, texts: Sequence[str], places: Sequence[int], special: bool = False
) -> list[list[int]]:
    """The ids of each text's compressed stream, with one VoCo token for each image; arguments as in
    :func:`stream_of_texts`.
    """
    vocab = attachment(model).vocab
    blank = Image.new("RGB", _BLANK)
    blanks = [[blank] * count for count in places] if any(places) else None
    encoded = insert_voco_tokens(
        _tokenized(processor, texts, blanks, special),
        vocab,
        1,
        pad_token_id=pad_id_of(processor),
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


def image_text(processor: Any) -> str:
    """What the chat template writes for one image: the text that a second image adds to a turn."""
    mark = {"type": "text", "text": _MARK}
    turns = [[{"role": "user", "content": [*[{"type": "image"}] * n, mark]}] for n in (1, 2)]
    one, two = (render(processor, [turn])[0] for turn in turns)
    start, length = len(os.path.commonprefix([one, two])), len(two) - len(one)
    return two[start : start + length]


def stream_ids_in_pieces(
    model: Any,
    processor: Any,
    text: str,
    places: int,
    special: bool = False,
    known: dict[str, list[int]] | None = None,
) -> list[int]:
    """As :func:`stream_ids` of one text, at flat memory whatever the number of images.

    The processor must run on something where each image stands. Between two images the ids depend on the text
    there alone, so it runs on a few images at a time, and once for texts that are alike.

    Args:
        text: a conversation that the chat template has rendered.
        places: images in it.
        known: ids by text between two images, from an earlier call; filled with those of this one.
    """
    unit = image_text(processor) if places > _IMAGES_AT_ONCE else ""
    pieces = text.split(unit) if unit else []
    if len(pieces) != places + 1:  # few images, or a template that numbers them: all at once
        return stream_ids(model, processor, [text], [places], special)[0]
    voco = attachment(model).vocab.voco_id
    (head,) = stream_ids(model, processor, [pieces[0] + unit], [1], special)
    (tail,) = stream_ids(model, processor, [unit + pieces[-1]], [1])
    before = {} if known is None else dict(known)
    found = {piece: before[piece] for piece in pieces[1:-1] if piece in before}
    new = [piece for piece in dict.fromkeys(pieces[1:-1]) if piece not in found]
    for start in range(0, len(new), _IMAGES_AT_ONCE):
        part = new[start : start + _IMAGES_AT_ONCE]
        joined = unit + "".join(piece + unit for piece in part)
        (ids,) = stream_ids(model, processor, [joined], [len(part) + 1])
        at = [i for i, token in enumerate(ids) if token == voco]
        for piece, a, b in zip(part, at[:-1], at[1:], strict=True):
            found[piece] = ids[a + 1 : b]
    if known is not None:  # no more than this prompt holds
        known.clear()
        known.update(found)
    stream = head[: head.index(voco) + 1]
    for piece in pieces[1:-1]:
        stream += [*found[piece], voco]
    return stream + tail[tail.index(voco) + 1 :]


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


def check_text_before(processor: Any, text: str) -> None:
    """Refuse a text before the images that would not stand there, or would be read as an image.

    Raises:
        ValueError: the chat template writes all images first, or the text holds an image's placeholder.
    """
    if not keeps_order(processor):
        raise ValueError(
            "this processor's chat template writes all images before all text, so no text stands before an "
            "image; leave the text before it out, or give a template that writes parts in order."
        )
    for mark in ("<image>", getattr(processor, "image_token", None)):
        if isinstance(mark, str) and mark and mark in text:
            raise ValueError(
                f"the text before the image holds {mark!r}, which is read as an image; take it out."
            )


def keeps_order(processor: Any) -> bool:
    """Whether the chat template writes texts and images of a turn in the order of its parts."""
    texts = [{"type": "text", "text": f"{_MARK}{n}"} for n in range(3)]
    content = [texts[0], {"type": "image"}, texts[1], {"type": "image"}, texts[2]]
    whole = render(processor, [[{"role": "user", "content": content}]])[0]
    at = [whole.find(f"{_MARK}{n}") for n in range(3)]
    between = [whole[a + 2 : b].strip() for a, b in zip(at[:-1], at[1:], strict=True)]
    return min(at) >= 0 and at == sorted(at) and bool(between[0]) and between[0] == between[1]
