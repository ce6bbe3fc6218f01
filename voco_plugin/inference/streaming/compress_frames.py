"""Stage 1 over a video: each frame or segment is compressed by itself, chunk by chunk, so that a video of any
length runs at flat memory (paper, Sec. 3.4).

A segment of one frame is an image to every family. Families whose processors take videos (LLaVA-NeXT-Video,
Video-LLaVA, LLaVA-OneVision, Qwen2/2.5/3-VL) also make one block of several frames, as their vision towers
merge them: ``frames_as="video"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image

from ...cache import VoCoCache
from ...core.attachment import attachment
from ...video.frames import Frame, Segment
from ..answering import compress_images, on_device
from ..prompts import ask, image_text, render, run_processor

FRAMES_AS = ("auto", "image", "video")


def compress_video(
    model: Any, processor: Any, frames: Iterable[Frame | Segment], **options: Any
) -> Iterator[VoCoCache]:
    """The blocks of a video in order, a cache of one block each; frames are read as they are needed.

    Args:
        frames: frames, or segments that are made already.
        options: as of :func:`compress_segments`.

    Raises:
        ValueError: what :func:`compress_segments` raises.
    """
    for _, cache in compress_segments(model, processor, frames, **options):
        yield cache


@torch.no_grad()
def compress_segments(
    model: Any,
    processor: Any,
    frames: Iterable[Frame | Segment],
    *,
    num_tokens: int | None = None,
    frames_per_block: int = 1,
    frames_as: str = "auto",
    batch_size: int = 8,
    max_memory: int | None = None,
    tick: Callable[[int], Any] | None = None,
) -> Iterator[tuple[Segment, VoCoCache]]:
    """As :func:`compress_video`, each block with the segment it was made from.

    Args:
        num_tokens: K a block; ``None`` takes the model's.
        frames_per_block: frames of a segment, where frames are given.
        frames_as: ``image``: a frame is an image. ``video``: a segment is a video of its own, as the
            processor takes it. ``auto``: ``image`` for one frame a block, else ``video``.
        batch_size: segments prepared and run at a time.
        max_memory: bytes of working memory that one forward may take (``model.compress``).
        tick: called with the number of frames just done.

    Raises:
        ValueError: several frames a block for a family that takes no video, or a number of frames that it
            does not make one block of.
        BadImageError: the image processor does not take a frame.
    """
    made = _segments(frames, frames_per_block)
    while chunk := list(islice(made, batch_size)):
        longest = max(len(s.frames) for s in chunk)
        kind = resolve_frames_as(processor, max(longest, frames_per_block), frames_as)
        if kind == "image":
            caches = compress_images(
                model, processor, [s.frames[0].image for s in chunk], num_tokens=num_tokens,
                batch_size=batch_size, max_memory=max_memory,
            )  # fmt: skip
        else:
            caches = _compress_videos(model, processor, chunk, num_tokens, max_memory)
        for segment, cache in zip(chunk, caches, strict=True):
            yield segment, cache
            if tick is not None:
                tick(len(segment.frames))


def _segments(frames: Iterable[Frame | Segment], frames_per_block: int) -> Iterator[Segment]:
    if frames_per_block < 1:
        raise ValueError(f"frames_per_block={frames_per_block} must be at least 1.")
    group: list[Frame] = []
    for item in frames:
        if isinstance(item, Segment):
            if group:
                yield Segment(tuple(group))
                group = []
            yield item
            continue
        group.append(item)
        if len(group) == frames_per_block:
            yield Segment(tuple(group))
            group = []
    if group:
        yield Segment(tuple(group))


def resolve_frames_as(processor: Any, frames_per_block: int, frames_as: str = "auto") -> str:
    """``image`` or ``video``: what blocks of so many frames are made as with this processor.

    Raises:
        ValueError: they cannot be; the message says what can.
    """
    if frames_as not in FRAMES_AS:
        raise ValueError(f"frames_as={frames_as!r} is not known; use one of {', '.join(FRAMES_AS)}.")
    if frames_as == "image" and frames_per_block > 1:
        raise ValueError(
            f"frames_as='image' makes a block of one frame, not of {frames_per_block}; use frames_per_block=1"
            ", or frames_as='video' where the processor takes videos."
        )
    if frames_as == "image" or (frames_as == "auto" and frames_per_block == 1):
        return "image"
    name = type(processor).__name__
    if getattr(processor, "video_processor", None) is None or not _video_token(processor):
        raise ValueError(
            f"{name} takes no videos, so {frames_per_block} frame(s) cannot become one block; use "
            "frames_per_block=1 with frames_as='image'."
        )
    merged = _temporal_patch(processor)
    if frames_per_block % merged:
        raise ValueError(
            f"{name} merges {merged} frames into one temporal patch: frames_per_block={frames_per_block} "
            f"must be a multiple of {merged}, or frames_as='image' with frames_per_block=1."
        )
    return "video"


def _compress_videos(
    model: Any, processor: Any, chunk: list[Segment], num_tokens: int | None, max_memory: int | None
) -> Iterator[VoCoCache]:
    """Each segment as a video of its own; those of one length run together."""
    by_length: dict[int, list[int]] = {}
    for number, segment in enumerate(chunk):
        by_length.setdefault(len(segment.frames), []).append(number)
    found: dict[int, VoCoCache] = {}
    for numbers in by_length.values():
        inputs = encode_videos(model, processor, [chunk[n] for n in numbers])
        inputs = model.insert_voco_tokens(inputs, num_tokens=num_tokens, padding_side="left")
        cache = model.compress(**on_device(model, inputs), max_memory=max_memory)
        for row, number in enumerate(numbers):
            found[number] = cache.row(row)
            if len(found[number]) != 1:
                raise ValueError(
                    f"{type(processor).__name__} writes a segment of {len(chunk[number].frames)} frame(s) as "
                    f"{len(found[number])} runs of vision tokens, each a block of its own; use fewer "
                    "frames_per_block, so that a segment is one run."
                )
    return iter([found[n] for n in range(len(chunk))])


def encode_videos(model: Any, processor: Any, chunk: list[Segment]) -> dict[str, Any]:
    """A processor's output for segments of one length, each a video in a prompt of its own, ready for
    ``model.insert_voco_tokens``.

    The frames are taken as they are: the processor samples none of them again.
    """
    text = render(processor, [ask("")])[0]
    unit, image, video = image_text(processor), _token(processor, "image_token"), _video_token(processor)
    shown = video if _writes_markers(model, processor, len(chunk[0].frames)) else unit.replace(image, video)
    return _encoded(processor, [text.replace(unit, shown)] * len(chunk), chunk)


def _encoded(processor: Any, texts: list[str], chunk: list[Segment]) -> dict[str, Any]:
    videos = [[f.image for f in s.frames] for s in chunk]
    for video in videos:  # a last segment that is short: Qwen2-VL repeats its last frame, Qwen3-VL refuses it
        video += [video[-1]] * (-len(video) % _temporal_patch(processor))
    metadata = [_metadata(s, len(video)) for s, video in zip(chunk, videos, strict=True)]
    return run_processor(processor, texts, videos=videos, do_sample_frames=False, video_metadata=metadata)


def _temporal_patch(processor: Any) -> int:
    """How many frames the processor merges into one temporal patch."""
    return getattr(getattr(processor, "video_processor", None), "temporal_patch_size", None) or 1


def _writes_markers(model: Any, processor: Any, frames: int) -> bool:
    """Whether the processor itself puts a start marker before a video's tokens (Qwen3-VL, at each temporal
    patch), so that the chat template's would be a second one.
    """
    starts = attachment(model).vocab.starts
    blank = Segment(tuple(Frame(Image.new("RGB", (56, 56)), float(n), n) for n in range(frames)))
    ids = _encoded(processor, [_video_token(processor)], [blank])["input_ids"] if starts else torch.zeros(0)
    return any(bool((ids == start).any()) for start in starts)


def _token(processor: Any, name: str) -> str:
    token = getattr(processor, name, None)
    token = getattr(token, "content", token)
    return token if isinstance(token, str) else ""


def _video_token(processor: Any) -> str:
    return _token(processor, "video_token")


def _metadata(segment: Segment, count: int) -> dict[str, Any]:
    """What a processor asks of a video of ``count`` frames: Qwen2.5-VL places temporal patches by the seconds
    between them.
    """
    seconds = segment.end - segment.time
    fps = (len(segment.frames) - 1) / seconds if seconds > 0 else 1.0
    return {"total_num_frames": count, "fps": fps, "frames_indices": list(range(count))}
