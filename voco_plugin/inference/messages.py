"""Chat messages as people write them → conversations for the chat template, and the images that stand in
them.

    {"type": "image", "image": picture}   →  {"type": "image"}, and the picture opened
    "a string"                            →  [{"type": "text", "text": "a string"}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..cache import VoCoCache
from ..config import nearest
from ..data.images import open_image
from .prompts import Messages, ask, render

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SOURCES = ("image", "url", "path", "base64")
"""Keys under which transformers' chat templates find the image of a part."""


def conversations(
    prompts: Sequence[str | Messages],
    images: Sequence[Sequence[Any]] | None = None,
    caches: Sequence[VoCoCache] | None = None,
    *,
    processor: Any = None,
) -> tuple[list[Messages], list[list[Any]] | None]:
    """Conversations ready for the chat template, and the images of each, in order (``None``: there are none,
    or they are in ``caches``).

    Args:
        prompts: per prompt a question, which stands after its images, or chat messages.
        images: per prompt the images of its parts that bring none of their own.
        caches: per prompt the blocks that its image parts stand for; no image is opened then.
        processor: where given, its chat template must write every system and user text.

    Raises:
        ValueError: messages that are no conversation, or whose image parts are not as many as the images or
            blocks; the message names the prompt.
        BadImageError: an image that cannot be opened.
    """
    check_per_prompt(images, caches, len(prompts))
    talks: list[Messages] = []
    shown: list[list[Any]] = []
    for number, prompt in enumerate(prompts):
        name = f"prompt {number}"
        given = [] if images is None else list(images[number])
        blocks = None if caches is None else len(caches[number])
        if isinstance(prompt, str):
            talks.append(ask(prompt, len(given) if blocks is None else blocks))
            shown.append(given)
            continue
        talk, own = _read(prompt, name)
        if blocks is not None and blocks != len(own):
            raise ValueError(
                f"{name} has {len(own)} image part(s), and its cache holds {blocks} block(s); give one image "
                "part for each block."
            )
        talks.append(talk)
        shown.append([] if caches is not None else _filled(own, given, name))
    if processor is not None:
        _check_written(processor, talks)
    return talks, shown if caches is None and any(shown) else None


def check_per_prompt(images: Any, caches: Any, count: int, what: str = "prompts") -> None:
    """Refuse images and caches that are not one entry a prompt, before any of them is opened.

    Raises:
        ValueError: both are given, their number is another, or an entry is an image and not a list of them.
    """
    if images is not None and caches is not None:
        raise ValueError("give images or caches, not both.")
    if isinstance(caches, VoCoCache):
        raise ValueError(
            f"caches is one cache; give a list of one a prompt: [cache], or [cache.row(i) for i in "
            f"range({caches.num_rows})]."
        )
    if _is_image(images):
        raise ValueError("images is one image; give a list of images for each prompt: [[image]].")
    for name, given in (("images", images), ("caches", caches)):
        if given is not None and len(given) != count:
            raise ValueError(f"{len(given)} {name} for {count} {what}; give one entry per {what[:-1]}.")
    # entries of other sequences may be read when they are asked for
    for number, row in enumerate(images if isinstance(images, (list, tuple)) else ()):
        if row is None or _is_image(row):
            wrong = "None; give []" if row is None else "one image; give a list of them: [image]"
            raise ValueError(f"images[{number}] is {wrong}.")
    for number, cache in enumerate(caches if isinstance(caches, (list, tuple)) else ()):
        if not isinstance(cache, VoCoCache):
            raise ValueError(
                f"caches[{number}] is a {type(cache).__name__}; give a VoCoCache (an empty one, VoCoCache(), "
                "where a prompt has no image)."
            )


def _is_image(value: Any) -> bool:
    return isinstance(value, (Image.Image, str, bytes, Path))


def _read(talk: Any, name: str) -> tuple[Messages, list[Any]]:
    """The conversation with bare image parts, and what each image part holds (``None``: nothing)."""
    if isinstance(talk, Mapping):
        raise ValueError(
            f"{name} is a single turn; a conversation is a list of turns, and messages a list of "
            "conversations: [[turn, …], …]."
        )
    if not isinstance(talk, Sequence) or isinstance(talk, (str, bytes)) or not talk:
        raise ValueError(f"{name} is {talk!r}; give a list of turns, {{'role': …, 'content': …}}.")
    read: Messages = []
    own: list[Any] = []
    for turn in talk:
        if not isinstance(turn, Mapping) or "role" not in turn or turn.get("content") is None:
            raise ValueError(f"{name} holds the turn {turn!r}; a turn has a 'role' and a 'content'.")
        if turn["role"] not in _ROLES:
            raise ValueError(
                f"{name} holds a turn of the role {turn['role']!r}{nearest(str(turn['role']), _ROLES)}; use "
                "system, user or assistant."
            )
        content = turn["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(content, Sequence):
            raise ValueError(f"{name}: content is a {type(content).__name__}; give a string or a list.")
        read.append({**turn, "content": [_part(part, own, name) for part in content]})
    if read[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"{name} ends with a turn of the {read[-1]['role']}; it must end with the user's, which is to be "
            "answered."
        )
    return read, own


def _part(part: Any, own: list[Any], name: str) -> dict[str, Any]:
    """One part as chat templates know it; what an image part holds goes to ``own``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        held = [part[key] for key in _SOURCES if part.get(key) is not None]
        if len(held) > 1:
            raise ValueError(f"{name}: an image part holds {len(held)} images; give one under 'image'.")
        own.append(held[0] if held else None)
        return {"type": "image"}
    if kind == "image_url":
        held = part.get("image_url")
        own.append(held.get("url") if isinstance(held, Mapping) else held)
        if own[-1] is not None:
            return {"type": "image"}
    shown = repr(part if kind is None else kind)
    raise ValueError(
        f"{name} holds a part {shown[:60]}; use {{'type': 'text', 'text': …}} and {{'type': 'image', "
        "'image': …}."
    )


def _filled(own: list[Any], given: list[Any], name: str) -> list[Any]:
    """The images of all parts: their own, opened, and the ``given`` ones in the places of those without."""
    bare = sum(image is None for image in own)
    if bare != len(given):
        raise ValueError(
            f"{name} has {bare} image part(s) without an image of their own, and {len(given)} image(s) are "
            "given for them; put each image into its part ('image': …), or give one in images= for each."
        )
    following = iter(given)
    return [
        next(following) if image is None
        else image if hasattr(image, "shape")  # an array: the processor's to take
        else open_image(image, name)
        for image in own
    ]  # fmt: skip


def _check_written(processor: Any, talks: list[Messages]) -> None:
    """Refuse a chat template that leaves a text out without a word (some know no system turn)."""
    texts = render(processor, talks) if talks else []
    for number, (talk, text) in enumerate(zip(talks, texts, strict=True)):
        for turn in talk:
            if turn["role"] not in ("system", "user"):  # templates shorten answers (their thinking)
                continue
            for part in turn["content"]:
                if part["type"] == "text" and part["text"].strip() not in text:
                    raise ValueError(
                        f"prompt {number}: this processor's chat template leaves out the {turn['role']} text "
                        f"{part['text'].strip()[:40]!r}; say it in a user turn, or give a template that "
                        "writes it."
                    )


__all__ = ["check_per_prompt", "conversations"]
