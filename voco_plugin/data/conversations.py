"""LLaVA's record format → chat messages, in one place for the collator, the trainer and the loaders.

    {"conversations": [{"from": "human", "value": "<image>\\nwhat is it?"}, {"from": "gpt", "value": "cat"}],
     "image": "cat.png"}

becomes

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
     {"role": "assistant", "content": [{"type": "text", "text": "cat"}]}]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

PLACEHOLDER = "<image>"
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip

TIME_TEXT = re.compile(r"<\d+(\.\d+)?s>")
"""The text that may stand before a frame of a video and says when it is: ``<1.0s>``."""


def time_text(seconds: float) -> str:
    """``12`` → ``<12.0s>``: a frame's time from the start of its video, to a tenth of a second.

    Raises:
        ValueError: the time is not finite, or before the start.
    """
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"time {seconds} s of a frame is none: give seconds from the video's start.")
    return f"<{seconds:.1f}s>"


def is_time_text(content: Sequence[Mapping[str, Any]], place: int) -> bool:
    """Whether part ``place`` of a message is the time text of the image right after it."""
    part = content[place]
    return (
        part["type"] == "text"
        and place + 1 < len(content)
        and content[place + 1]["type"] == "image"
        and TIME_TEXT.fullmatch((part.get("text") or "").strip()) is not None
    )


def image_times(messages: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The time text before each image of a conversation, in order; ``None`` where there is none."""
    found: list[str | None] = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, (list, tuple)):
            continue
        for place, part in enumerate(content):
            if part["type"] == "image":
                timed = place > 0 and is_time_text(content, place - 1)
                found.append(content[place - 1]["text"].strip() if timed else None)
    return found


def split_placeholders(text: str) -> list[dict[str, Any]]:
    """``text`` cut at each ``<image>`` into typed parts, in order; empty texts are left out.

    One line break on either side of the placeholder goes with it: the chat template, not the data, says how
    an image is set off from the text.
    """
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(re.split(rf"\n?{PLACEHOLDER}\n?", text)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]


def llava_to_messages(example: Mapping[str, Any], where: str = "the sample") -> list[dict[str, Any]]:
    """The messages of one LLaVA record (``conversations`` of ``from`` and ``value``), without its images.

    Args:
        where: how errors call the record.

    Raises:
        ValueError: there is no such list, a speaker is unknown, or a turn's text is missing.
    """
    turns = example.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'{where} has no "conversations" list: give [{{"from": "human", "value": …}}, …]')
    messages = []
    for number, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in ROLES:
            raise ValueError(f'{where}, turn {number}: "from" is {speaker!r}, not one of {", ".join(ROLES)}')
        if not isinstance(turn.get("value"), str):
            raise ValueError(f'{where}, turn {number}: "value" is {turn.get("value")!r}, not a text')
        messages.append({"role": ROLES[speaker], "content": split_placeholders(turn["value"])})
    return messages
