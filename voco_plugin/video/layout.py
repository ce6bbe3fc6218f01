"""How a video stands in a prompt: its blocks in order, each with its time before it where that is asked for.

    plain        C C  C C  C C  question                    2 positions a frame (K = 2)
    time text    <0.0s> C C  <1.0s> C C  question           and the time's own tokens

A block takes the place of one image of the chat template, whatever it was compressed from: what the template
writes around an image it writes around a block. Times are ordinary text, so the LLM reads them without new
tokens, as Qwen-VL-class models do.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from ..answering import check_times, render, stream_ids
from ..conversations import time_text as time_label

_MARK = "\ue001"  # private use: in no prompt
_AT_ONCE = 32  # images in a prompt that the processor is run on


def video_parts(times: Sequence[float], time_text: bool = False) -> list[dict[str, Any]]:
    """Chat content of a video whose blocks begin at ``times`` (seconds): an image part a block.

    Args:
        time_text: whether the time (:func:`~voco_plugin.conversations.time_text`) stands before each.
    """
    parts: list[dict[str, Any]] = []
    for time in times:
        if time_text:
            parts.append({"type": "text", "text": time_label(time)})
        parts.append({"type": "image"})
    return parts


def check_layout(config: Any, processor: Any, time_text: bool) -> None:
    """Refuse what a video cannot be laid out in, and warn of what costs it positions.

    Args:
        config: the model's ``VoCoConfig``.

    Raises:
        ValueError: blocks that cannot be moved (``block_context="prefix"``), or ``time_text`` under a chat
            template that does not write a text where it stands among the images.
    """
    if config.block_context != "self":
        raise ValueError(
            f"block_context={config.block_context!r} ties each block to what stands before it, so a video's "
            "blocks could be neither thinned nor asked about twice; use block_context='self'."
        )
    if config.positions != "compact":
        warnings.warn(
            f"positions={config.positions!r}: each frame uses up as many positions as it has vision tokens, "
            "not K; positions='compact' holds far longer videos.",
            stacklevel=3,
        )
    if time_text:
        check_times(processor)


def image_text(processor: Any) -> str:
    """What the chat template writes for one image: the text that a second image adds to a turn."""
    mark = {"type": "text", "text": _MARK}
    turns = [[{"role": "user", "content": [*[{"type": "image"}] * n, mark]}] for n in (1, 2)]
    one, two = (render(processor, [turn])[0] for turn in turns)
    start, length = len(os.path.commonprefix([one, two])), len(two) - len(one)
    return two[start : start + length]


def video_stream_ids(
    model: Any,
    processor: Any,
    text: str,
    places: int,
    special: bool = False,
    known: dict[str, list[int]] | None = None,
) -> list[int]:
    """As :func:`~voco_plugin.answering.stream_ids` of one text, at flat memory whatever the number of images.

    The processor must run on something where each image stands. Between two images the ids depend on the text
    there alone, so it runs on a few images at a time, and once for texts that are alike.

    Args:
        text: a conversation that the chat template has rendered.
        places: images in it.
        known: ids by text between two images, from an earlier call; filled with those of this one.
    """
    unit = image_text(processor) if places > _AT_ONCE else ""
    pieces = text.split(unit) if unit else []
    if len(pieces) != places + 1:  # few images, or a template that numbers them: all at once
        return stream_ids(model, processor, [text], [places], special)[0]
    from ..modeling import attachment

    voco = attachment(model).vocab.voco_id
    (head,) = stream_ids(model, processor, [pieces[0] + unit], [1], special)
    (tail,) = stream_ids(model, processor, [unit + pieces[-1]], [1])
    before = {} if known is None else dict(known)
    found = {piece: before[piece] for piece in pieces[1:-1] if piece in before}
    new = [piece for piece in dict.fromkeys(pieces[1:-1]) if piece not in found]
    for start in range(0, len(new), _AT_ONCE):
        part = new[start : start + _AT_ONCE]
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
