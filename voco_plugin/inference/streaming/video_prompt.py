"""A video in a prompt: its blocks in order, each with its time before it where that is asked for.

    plain        C C  C C  C C  question                    2 positions a frame (K = 2)
    time text    <0.0s> C C  <1.0s> C C  question           and the time's own tokens

A block takes the place of one image of the chat template, whatever it was compressed from: what the template
writes around an image it writes around a block. Times are ordinary text, so the LLM reads them without new
tokens, as Qwen-VL-class models do.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ...data.conversations import time_text as time_label
from ..prompts import check_times


def video_parts(times: Sequence[float], time_text: bool = False) -> list[dict[str, Any]]:
    """Chat content of a video whose blocks begin at ``times`` (seconds): an image part a block.

    Args:
        time_text: whether the time (:func:`~voco_plugin.data.conversations.time_text`) stands before each.
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
