"""Video instruction sets as rows that name a video file; frames are read when a row is.

    WebVid           CSV with videoid, contentUrl, page_dir, name; files page_dir/videoid.mp4
    Video-ChatGPT    JSON of {"video_id", "q", "a"}; files video_id.* (or folders of frames)
    LLaVA's style    JSON of {"video", "conversations"}, with <video> where its frames stand in the text

What comes out is a ``datasets.Dataset`` that stores names. A row, when it is accessed (in a worker of the
data loader), is in TRL's vision format: as many image parts as frames, side by side, each of which becomes a
block.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from voco_plugin.data.conversations import llava_to_messages
from voco_plugin.data.images import BadImageError, check_on_bad_sample
from voco_plugin.data.loaders import read_records

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

CAPTION_INSTRUCTION = "Provide a brief description of the given video."
"""What is asked of a video that has a caption only (WebVid)."""
SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", "")
"""What is tried behind the name of a video without a suffix; the empty one: a folder of frames."""
PLACEHOLDER = "<video>"
_WEBVID = ("videoid", "page_dir", "name")

Reader = Callable[..., Iterable[Any]]


def read_frames(path: str | Path, **sampling: Any) -> list[Image.Image]:
    """The frames of ``path`` that ``sampling`` asks for (``count``, ``fps``, ``max_frames``, …), as RGB
    images, through :func:`voco_plugin.video.read_video`.
    """
    from voco_plugin.video import read_video

    return [frame.image for frame in read_video(str(path), **sampling)]


@dataclass(frozen=True)
class VideoRow:
    """One conversation about one video.

    Attributes:
        video: the file, or folder of frames; whether it is there shows when it is read.
        turns: ``(role, text)``; ``<video>`` in a text is where the frames stand, else they open the first
            user's.
        id: how messages call the row.
    """

    video: str
    turns: tuple[tuple[str, str], ...]
    id: str


@dataclass
class ReadFrames:
    """The transform of a video set: rows that name a video → rows with its frames, when they are accessed.

    Args:
        sampling: which frames: ``count``, ``fps``, ``scene``, ``start``, ``end``, ``max_frames`` of
            :func:`~voco_plugin.video.read_video`.
        on_bad_sample: of a video that cannot be read: ``raise``, or ``skip``: the reason is logged, and the
            row holds an unreadable image, in whose place a :class:`~voco_plugin.VoCoDataCollator` with
            ``on_bad_sample="skip"`` puts another row.
        reader: what reads frames, ``reader(path, **sampling)`` → RGB images.

    Raises:
        BadImageError: a video cannot be read, or has no frames; the message names row and file.
    """

    sampling: Mapping[str, Any]
    on_bad_sample: str = "raise"
    reader: Reader = read_frames

    def __post_init__(self) -> None:
        check_on_bad_sample(self.on_bad_sample)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if not {"id", "messages", "images"} <= set(batch):  # one column alone is asked for
            return batch
        made: dict[str, list[Any]] = {"id": list(batch["id"]), "messages": [], "images": []}
        for name, turns, videos in zip(batch["id"], batch["messages"], batch["images"], strict=True):
            images = self.frames(videos[0], name)
            made["images"].append(images)
            made["messages"].append(messages_of([(t["role"], t["content"]) for t in turns], len(images)))
        return made

    def frames(self, video: str, name: str) -> list[Any]:
        """The frames of ``video``, which belongs to the row ``name``."""
        try:
            images = list(self.reader(video, **self.sampling))
            if not images:
                raise BadImageError(f"video {video} gives no frame under {dict(self.sampling)}.")
            return images
        except (BadImageError, OSError) as error:
            problem = f"row {name!r}: {error}"
            if self.on_bad_sample == "raise":
                raise BadImageError(problem) from None
            logger.warning("%s", problem)
            return [{"path": video, "bytes": b""}]


def messages_of(turns: Sequence[tuple[str, str]], frames: int) -> list[dict[str, Any]]:
    """The messages of ``turns`` (role, text) with ``frames`` image parts where the video stands."""
    placed = any(PLACEHOLDER in text for _, text in turns)
    messages = []
    for role, text in turns:
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(text.split(PLACEHOLDER)):
            if number:
                parts += [{"type": "image", "text": None} for _ in range(frames)]
            # a line break beside the placeholder goes with it: the chat template sets images off
            piece = piece.removeprefix("\n") if number else piece
            piece = piece.removesuffix("\n") if number < text.count(PLACEHOLDER) else piece
            if piece:
                parts.append({"type": "text", "text": piece})
        if not placed and role == "user":
            parts = [{"type": "image", "text": None} for _ in range(frames)] + parts
            placed = True
        messages.append({"role": role, "content": parts or [{"type": "text", "text": ""}]})
    return messages


def load_video_dataset(
    files: str | Path | Sequence[str | Path],
    video_folder: str | Path | None = None,
    *,
    instruction: str = CAPTION_INSTRUCTION,
    on_bad_sample: str = "raise",
    reader: Reader = read_frames,
    **sampling: Any,
) -> Dataset:
    """Load one or several video sets, one after the other; each file's format is told by its contents.

    Args:
        files: WebVid's ``.csv``, Video-ChatGPT's or LLaVA's ``.json``/``.jsonl``; several in a list, or in
            one text with commas between them.
        video_folder: where video names start; ``None``: beside each file.
        instruction: what is asked of videos that have captions only.
        on_bad_sample, reader: of :class:`ReadFrames`.
        sampling: ``count=16``, ``fps=1.0``, ``max_frames=…``: which frames; one of ``count``, ``fps`` and
            ``scene`` is needed.

    Returns:
        a ``datasets.Dataset`` whose row ``i`` is ``{"id", "messages", "images"}``; what it stores are names.

    Raises:
        ValueError: a file does not exist or is in no known format, a record is malformed (the message names
            it), or the sampling is left out.
    """
    if not any(sampling.get(name) is not None for name in ("count", "fps", "scene")):
        raise ValueError(
            "which frames of a video are read must be said: give count=… (video_frames in a recipe) or fps=…."
        )
    names = [name.strip() for name in files.split(",")] if isinstance(files, str) else files
    paths = [Path(name) for name in ([names] if isinstance(names, Path) else names)]
    rows: list[VideoRow] = []
    for path in paths:
        path = path.expanduser()
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give a WebVid CSV or a JSON file of conversations.")
        folder = Path(video_folder).expanduser() if video_folder is not None else path.parent
        webvid = path.suffix.lower() == ".csv"
        rows += _webvid(path, folder, instruction) if webvid else _records(path, folder)
    chosen = {name: value for name, value in sampling.items() if value is not None}
    return as_dataset(rows, ReadFrames(chosen, on_bad_sample, reader))


def as_dataset(rows: Sequence[VideoRow], frames: ReadFrames) -> Dataset:
    """``rows`` as a data set that reads its frames through ``frames``.

    The columns have the names that the trainer keeps.
    """
    from datasets import Dataset

    if not rows:
        raise ValueError("a video set without rows; name a file that holds some.")
    stored = {
        "id": [row.id for row in rows],
        "messages": [[{"role": role, "content": text} for role, text in row.turns] for row in rows],
        "images": [[row.video] for row in rows],
    }
    return Dataset.from_dict(stored).with_transform(frames)


def is_video_set(path: str | Path) -> bool:
    """Whether a file is one of the formats above, told by its name and first record."""
    path = Path(path).expanduser()
    if not path.is_file():
        return False
    if path.suffix.lower() == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            return set(_WEBVID) <= set(next(csv.reader(file), []))
    if path.suffix.lower() not in (".json", ".jsonl"):
        return False
    first = next(iter(read_records(path)), None)
    return isinstance(first, dict) and bool({"video", "video_id"} & set(first))


def _webvid(path: Path, folder: Path, instruction: str) -> list[VideoRow]:
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _WEBVID if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; WebVid has {', '.join(_WEBVID)}.")
        for number, record in enumerate(reader):
            video, page, caption = (record[name] for name in _WEBVID)
            if not video or page is None or not caption:
                raise ValueError(f"{path}: row {number} ({video!r}) lacks a videoid, a page_dir or a name.")
            place = str(folder / page / f"{video}.mp4")
            rows.append(VideoRow(place, (("user", instruction), ("assistant", caption.strip())), video))
    return rows


def _records(path: Path, folder: Path) -> list[VideoRow]:
    rows = []
    for number, record in enumerate(read_records(path)):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no object; give video_id, q and a, or video and conversations.")
        name = record.get("video", record.get("video_id"))
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: video is {name!r}; give the name of a file as 'video' or 'video_id'.")
        if "conversations" in record:
            turns = _turns(record, where)
        else:
            asked, answer = record.get("q"), record.get("a")
            if not isinstance(asked, str) or not isinstance(answer, str):
                raise ValueError(
                    f"{where} has the keys {', '.join(map(str, record))}; give 'q' and 'a' as texts, or "
                    "'conversations'."
                )
            turns = (("user", asked), ("assistant", answer))
        rows.append(VideoRow(_file(folder, name), turns, str(record.get("id", f"{name}/{number}"))))
    return rows


def _turns(record: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    messages = llava_to_messages(record, where)
    spoken = zip(messages, record["conversations"], strict=True)
    turns = tuple((message["role"], turn["value"]) for message, turn in spoken)
    marks = sum(text.count(PLACEHOLDER) for _, text in turns)
    if marks > 1 or any("<image>" in text for _, text in turns):
        raise ValueError(
            f"{where}: {marks} {PLACEHOLDER} and perhaps <image>; a row holds one video: write {PLACEHOLDER} "
            "once, or leave it out (the frames then open the first question)."
        )
    return turns


def _file(folder: Path, name: str) -> str:
    """The video called ``name``: as it is where it has a known suffix, else the first that is there."""
    if Path(name).suffix.lower() in SUFFIXES[:-1]:
        return str(folder / name)
    found = next((p for s in SUFFIXES if (p := folder / f"{name}{s}").exists()), folder / f"{name}.mp4")
    return str(found)
