"""The harness's prompts → conversations with bare image parts, and their images in order.

    chat      {"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", …}]}
    simple    "context", [picture, "video.mp4", …]     visuals first, or where the context says <image>

A video becomes its frames, an image part each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from voco_plugin.data.conversations import time_text
from voco_plugin.video import VIDEO_SUFFIXES, read_video

_PLACE = "<image>"
_VIDEOS_KEPT = 2  # decoded; the questions about one video follow one another
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass
class Prompt:
    """A conversation whose image parts are bare, and the images (PIL) that stand there.

    Attributes:
        name: of task and question, for errors.
        keys: of the images in the reader's store, once they are opened.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    name: str = ""
    keys: tuple[str, ...] = ()

    def drop_images(self) -> None:
        """Leave the words alone."""
        self.messages = [
            {**turn, "content": [part for part in turn["content"] if part["type"] != "image"]}
            for turn in self.messages
        ]
        self.images = []


class Videos:
    """Videos → frames; the last ones stay decoded.

    Args:
        count, fps: one of them: frames of each video, or a second.
        time_text: whether each frame's time stands before it, as ``<1.0s>``.
    """

    def __init__(self, count: int | None = None, fps: float | None = None, time_text: bool = False) -> None:
        self.count = count if count is not None or fps is not None else 8
        self.fps, self.time_text = fps, time_text
        self._kept: OrderedDict[Any, list[Any]] = OrderedDict()

    def parts(self, source: Any, start: float | None, end: float | None) -> tuple[list[Any], list[Any]]:
        """The content parts of a video, and its frames."""
        key = (str(source), start, end)
        if key not in self._kept:
            found = read_video(source, count=self.count, fps=self.fps, start=start, end=end)
            self._kept[key] = list(found)
            if len(self._kept) > _VIDEOS_KEPT:
                self._kept.popitem(last=False)
        parts: list[dict[str, Any]] = []
        for frame in self._kept[key]:
            if self.time_text:
                parts.append({"type": "text", "text": time_text(frame.time)})
            parts.append({"type": "image"})
        return parts, [frame.image for frame in self._kept[key]]


def read_chat(messages: Sequence[Mapping[str, Any]], videos: Videos, name: str) -> Prompt:
    """A prompt of a chat task.

    Raises:
        ValueError: it holds audio, or something that is no image, video or text.
    """
    prompt = Prompt([], [], name)
    for turn in messages:
        content = turn["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts: list[dict[str, Any]] = []
        for part in content:
            kind = part["type"]
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif kind in ("image", "video"):
                _show(part.get("url", part.get(kind)), kind, parts, prompt, videos)
            else:
                raise ValueError(f"{name} holds {kind}; the model voco reads text, images and videos.")
        prompt.messages.append({"role": turn["role"], "content": parts})
    return prompt


def read_simple(context: str, visuals: Any, videos: Videos, name: str) -> Prompt:
    """A prompt of a simple task: visuals first, or where the context has ``<image>`` for each.

    Raises:
        ValueError: the context has another number of ``<image>`` than there are visuals.
    """
    listed = list(visuals) if isinstance(visuals, (list, tuple)) else [] if visuals is None else [visuals]
    flat = [one for item in listed for one in (item if isinstance(item, (list, tuple)) else [item])]
    pieces = context.split(_PLACE)
    if len(pieces) > 1 and len(pieces) - 1 != len(flat):
        raise ValueError(
            f"{name}: its text has {len(pieces) - 1} {_PLACE} for {len(flat)} image(s) or video(s)."
        )
    prompt, parts = Prompt([], [], name), []
    for number, visual in enumerate(flat):
        if len(pieces) > 1 and pieces[number].strip():
            parts.append({"type": "text", "text": pieces[number]})
        _show(visual, None, parts, prompt, videos)
    last = pieces[-1] if len(pieces) > 1 else context
    parts.append({"type": "text", "text": last.lstrip("\n") if len(pieces) > 1 else last})
    prompt.messages.append({"role": "user", "content": parts})
    return prompt


def _show(source: Any, kind: str | None, parts: list[Any], prompt: Prompt, videos: Videos) -> None:
    """Put an image or a video into the prompt."""
    start = end = None
    if isinstance(source, Mapping):
        start, end = source.get("video_start"), source.get("video_end")
        kind = source.get("type", "video" if start is not None or end is not None else kind)
        inner = [source[k] for k in ("url", "path", "video", "image", "bytes") if source.get(k) is not None]
        if not inner:
            raise ValueError(f"{prompt.name} shows {sorted(source)}; an image or a path is wanted.")
        source = inner[0]
    suffix = Path(source).suffix.lower() if isinstance(source, (str, Path)) else ""
    if kind is None:
        kind = "video" if suffix in VIDEO_SUFFIXES and suffix not in _IMAGES else "image"
    if kind == "audio":
        raise ValueError(f"{prompt.name} holds audio; the model voco reads text, images and videos.")
    if kind == "video":
        more, frames = videos.parts(source, start, end)
        parts += more
        prompt.images += frames
        return
    if not isinstance(source, (Image.Image, str, Path, bytes)):
        raise ValueError(
            f"{prompt.name} shows a {type(source).__name__}; the model voco reads images (PIL, paths) and "
            "video files."
        )
    parts.append({"type": "image"})
    prompt.images.append(source)
