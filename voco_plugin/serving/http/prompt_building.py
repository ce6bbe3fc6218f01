"""Messages → the compressed stream that the engine reads, built as the package's own stage 2 builds it.

parts → images and videos decoded, all compressed at once → one conversation with bare image parts → ids
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from ...cache import VoCoCache
from ...inference.messages import conversations
from ...inference.prompts import Messages, check_times, stream_of
from ..blocks import Compressed, UnknownKeyError
from ..engines.request import EngineError
from .answer_schemas import PromptDetails
from .errors import ApiError
from .front import Front
from .media import data_of_url, frames_of_bytes, image_of_bytes
from .request_record import RequestRecord
from .schemas import ImagePart, KeptPart, Message, TextPart, VideoPart

logger = logging.getLogger(__name__)

MediaPart = ImagePart | VideoPart | KeptPart


@dataclass(frozen=True)
class BuiltPrompt:
    """A prompt, ready for the engine.

    Attributes:
        ids: the compressed stream.
        blocks: of its VoCo tokens, one row.
        keys: of the blocks.
        details: what it is made of.
    """

    ids: tuple[int, ...]
    blocks: VoCoCache
    keys: tuple[str, ...]
    details: PromptDetails


async def build_chat(
    front: Front, messages: Sequence[Message], num_tokens: int | None, record: RequestRecord
) -> BuiltPrompt:
    """The prompt of a chat.

    Raises:
        ApiError: an image cannot be had or read, a key is not kept, or the messages are no conversation.
    """
    _check_turns(front, messages)
    check_num_tokens(front, num_tokens)
    found: list[Compressed] = await _all(
        [_compressed(front, part, num_tokens, param) for part, param in _media(messages)]
    )
    for one in found:
        front.metrics.compressed(one)
    record.images, record.hits = len(found), sum(one.hit for one in found)
    return await front.in_prompt_thread(_build, front, messages, found)


def built_text(ids: Sequence[int]) -> BuiltPrompt:
    """A prompt of text alone."""
    details = PromptDetails(text_tokens=len(ids), voco_tokens=0, saved_vision_tokens=0, cached_tokens=0)
    return BuiltPrompt(tuple(ids), VoCoCache(), (), details)


# -- images, videos and keys


def check_num_tokens(front: Front, num_tokens: int | None) -> None:
    """Refuse a K that nobody means: stage 1 runs over vision tokens and K together.

    Raises:
        ApiError: it is above the server's limit.
    """
    most = max(front.settings.max_num_tokens, front.blocks.num_tokens)
    if num_tokens is not None and num_tokens > most:
        raise ApiError(
            f"num_tokens={num_tokens} is above this server's {most} VoCo tokens an image; ask for fewer.",
            "num_tokens", "invalid_value",
        )  # fmt: skip


async def compressed_image(front: Front, url: str, num_tokens: int | None, param: str) -> Compressed:
    """The block of the image behind ``url``.

    Raises:
        ApiError: it cannot be had or read, or the model cannot give this K.
    """
    if url[:5].lower() == "data:":
        data = await front.in_media_thread(data_of_url, url, "image", front.settings.max_image, param)
    else:
        data = await front.fetcher.fetch(url, param)
    image = await front.in_media_thread(image_of_bytes, data, front.settings, param)
    return await _blocks(front.blocks.of_image(image, num_tokens), param)


async def compressed_video(front: Front, url: str, num_tokens: int | None, param: str) -> Compressed:
    """The blocks of the video in ``url``.

    Raises:
        ApiError: as :func:`compressed_image`.
    """
    if url[:5].lower() != "data:":
        raise ApiError("videos are taken as data URLs alone; send data:video/mp4;base64,….", param)
    data = await front.in_media_thread(data_of_url, url, "video", front.settings.max_video, param)
    frames = await front.in_media_thread(frames_of_bytes, data, front.settings, param)
    return await _blocks(front.blocks.of_video(frames, num_tokens), param)


async def _compressed(front: Front, part: MediaPart, num_tokens: int | None, param: str) -> Compressed:
    if isinstance(part, KeptPart):
        return await _blocks(front.blocks.of_key(part.key), f"{param}.key")
    if isinstance(part, ImagePart):
        return await compressed_image(front, part.image_url.url, num_tokens, f"{param}.image_url.url")
    return await compressed_video(front, part.video_url.url, num_tokens, f"{param}.video_url.url")


async def _blocks(work: Coroutine[Any, Any, Compressed], param: str) -> Compressed:
    """What blocks are asked for, with their errors as a client reads them: what is wrong with the request is
    said, what is wrong here (a store that is full, no memory) is for the log."""
    try:
        return await work
    except UnknownKeyError as problem:
        raise ApiError(str(problem), param, "unknown_key", status=404) from None
    except ValueError as problem:  # the K, the key, or an image that the image processor does not take
        raise ApiError(str(problem), param, "invalid_value") from None
    except EngineError:
        raise
    except Exception as problem:
        logger.exception("stage 1 failed")
        kind = type(problem).__name__
        raise ApiError(
            f"the image could not be compressed or kept ({kind}); the server's log says why.",
            param, "compression_failed", status=503, headers={"Retry-After": "1"},
        ) from None  # fmt: skip


async def _all(works: Sequence[Coroutine[Any, Any, Compressed]]) -> list[Compressed]:
    """All at once, so that stage 1 takes them together; the first failure ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- the conversation


def _check_turns(front: Front, messages: Sequence[Message]) -> None:
    """What can be refused before anything is decoded, compressed or tokenized."""
    characters = images = 0
    pieces = sum(1 if isinstance(one.content, str) else len(one.content) for one in messages)
    if pieces > front.engine.max_positions:  # a turn takes a position at least
        raise ApiError(
            f"the messages have {pieces} parts; this model has {front.engine.max_positions} positions: send "
            "fewer.",
            "messages", "context_length_exceeded",
        )  # fmt: skip
    for number, message in enumerate(messages):
        where = f"messages[{number}].content"
        if message.content == []:
            raise ApiError(f"{where} holds no part; give a text.", where)
        for position, part in enumerate(_parts(message)):
            param = where if isinstance(message.content, str) else f"{where}[{position}]"
            if isinstance(part, TextPart):
                front.marks.check_text(part.text, param)
                characters += len(part.text)
            elif message.role != "user":
                raise ApiError(
                    f"{param} is an image in a turn of the {message.role}; give it in the user's.", param
                )
            else:
                images += 1
    settings = front.settings
    if messages[-1].role != "user":
        raise ApiError(
            f"the last message is the {messages[-1].role}'s; end with the user's, which is to be answered.",
            "messages",
        )
    if characters > settings.max_text:
        raise ApiError(
            f"the messages have {characters} characters, and this server takes {settings.max_text}; shorten "
            "them.",
            "messages", "context_length_exceeded",
        )  # fmt: skip
    if images > settings.max_images:
        raise ApiError(
            f"the messages hold {images} images, and this server takes {settings.max_images}; send fewer.",
            "messages", "too_many_images",
        )  # fmt: skip


def _parts(message: Message) -> Sequence[TextPart | MediaPart]:
    if isinstance(message.content, str):
        return [TextPart(type="text", text=message.content)]
    return message.content


def _media(messages: Sequence[Message]) -> list[tuple[MediaPart, str]]:
    return [
        (part, f"messages[{number}].content[{position}]")
        for number, message in enumerate(messages)
        for position, part in enumerate(_parts(message))
        if not isinstance(part, TextPart)
    ]


def _build(front: Front, messages: Sequence[Message], found: Sequence[Compressed]) -> BuiltPrompt:
    """In the thread of prompts: the processor is slow."""
    try:
        cache = VoCoCache.cat([one.cache for one in found])
        talk = _talk(messages, found)
        # one question about many images is tokenized once: its ids depend on its words and on each K alone
        name = json.dumps([talk, cache.num_tokens])
        ids = front.known_prompts.get(name)
        if ids is None:
            if any(time is not None for one in found for time in one.times or ()):
                check_times(front.processor)
            talks, _ = conversations([talk], caches=[cache], processor=front.processor)
            front.marks.check_talk(front.processor, talks[0])
            stream = stream_of(front.model, front.processor, talks, cache)
            ids = tuple(stream["input_ids"][0].tolist())
    except TemplateError as problem:
        raise ApiError(f"this model's chat template refuses the messages: {problem}", "messages") from None
    except ValueError as problem:
        raise ApiError(
            str(problem).removeprefix("prompt 0: ").removeprefix("prompt 0 "), "messages"
        ) from None
    voco = sum(cache.num_tokens)
    if ids.count(front.vocabulary.voco_id) != voco:
        raise ApiError(
            "the messages' text is read as a part of an image; change it.", "messages", "image_mark"
        )
    front.known_prompts.put(name, ids)
    front.metrics.read(cache)
    details = PromptDetails(
        text_tokens=len(ids) - voco, voco_tokens=voco,
        saved_vision_tokens=max(0, sum(block.num_vision for block in cache) - voco),
        cached_tokens=sum(sum(one.cache.num_tokens) for one in found if one.hit),
    )  # fmt: skip
    return BuiltPrompt(ids, cache, tuple(key for one in found for key in one.keys), details)


def _talk(messages: Sequence[Message], found: Sequence[Compressed]) -> Messages:
    """With an image part for each block, and the time of a video's before it."""
    following = iter(found)
    talk: Messages = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in _parts(message):
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            one = next(following)
            for time in one.times or (None,) * len(one.cache):
                content += [] if time is None else [{"type": "text", "text": time}]
                content.append({"type": "image"})
        # templates know the name that OpenAI gave up for this turn
        talk.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return talk


__all__ = [
    "BuiltPrompt",
    "build_chat",
    "built_text",
    "check_num_tokens",
    "compressed_image",
    "compressed_video",
]
