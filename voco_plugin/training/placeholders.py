"""Where a conversation may say that an image stands: as an image part of a question, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..data.conversations import PLACEHOLDER


def check_answers(row: Mapping[str, Any], where: str) -> None:
    """Refuse an image inside an answer: its tokens would be what the model is to say.

    Args:
        row: in TRL's vision format.
        where: how errors call it.

    Raises:
        ValueError: it names the turn.
    """
    for key, number, message in _turns(row):
        answers = key == "completion" or message.get("role") == "assistant"
        content = message.get("content")
        if answers and isinstance(content, list) and any(part.get("type") == "image" for part in content):
            raise ValueError(
                f"{where}, turn {number} of {key}: an answer holds an image, and images are read, not "
                "written; put it into a question, or take the row out."
            )


def check_texts(row: Mapping[str, Any], where: str, processor: Any) -> None:
    """Refuse texts that hold what the processor takes for an image, or ``<image>`` in a row with images: of a
    conversation the chat template says where its images stand.

    Raises:
        ValueError: it names the turn.
    """
    marks = {str(getattr(processor, name, None) or "") for name in ("image_token", "boi_token")} - {""}
    marks |= {PLACEHOLDER} if row.get("images") else set()
    for key, number, message in _turns(row):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        for mark in sorted(marks):
            if any(mark in (part.get("text") or "") for part in parts):
                raise ValueError(
                    f"{where}, turn {number} of {key}: its text holds {mark!r}, which stands for an image; "
                    'write a part {"type": "image"} where the image is (or give conversations as LLaVA has '
                    "them, whose text is cut there), or take it out."
                )
    completion = row.get("completion")
    if isinstance(completion, str) and any(mark in completion for mark in marks):
        raise ValueError(f"{where}: the completion holds an image, and images are read, not written.")


def _turns(row: Mapping[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    for key in ("messages", "prompt", "completion"):
        if isinstance(row.get(key), list):
            for number, message in enumerate(row[key]):
                yield key, number, message
