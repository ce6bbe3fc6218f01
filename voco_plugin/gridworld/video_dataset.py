"""Writes the gridworld of videos: questions that need time, with exact answers, in the formats people use.

    out_dir/
      train.json  test.json    LLaVA format; "image" lists the frames' pictures in order, one <image> a frame
      images/train/000000/00.png   the pictures of a video: each once, however many frames show it
      images/train/pool/0000.png   (needle videos) pictures that all videos of the split share
      hf/                      a `datasets` folder with the columns of TRL's vision format, if asked for
      scenes.json              what each picture holds, cell by cell, and the seconds between two frames
      meta.json                the settings; what a guesser gets who sees nothing, one frame, or shuffled ones

Pictures are PNG files, not one animated file a video: a frame that is shown again costs its name, a row's
frames load through every loader of images, and pictures that are the same are compressed once.

A frame is a picture of the image world with 2 x 2 filled cells, so a model that reads those reads these. One
seed gives the same bytes; video `i` of a split does not depend on how many are written. The splits share
neither a handwritten digit nor a combination of things in the cells of a frame. With several numbers of
frames, video `i` has the `i`-th of them, over and over.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voco_plugin.data.conversations import PLACEHOLDER, split_placeholders, time_text
from voco_plugin.files import atomic_write_text
from voco_plugin.gridworld.questions import blind_accuracy
from voco_plugin.gridworld.scenes import SPLITS, Scene, draw_scene
from voco_plugin.gridworld.video_guess import guess_accuracy
from voco_plugin.gridworld.video_questions import PLOTS, VideoTurn, ask_video
from voco_plugin.gridworld.video_scenes import Video, sample_needle, sample_pool, sample_story

FORMAT = "gridworld-video"
FORMAT_VERSION = 1
MIN_FRAMES = 6
"""Below, the cuts leave no room: five things one after the other, and a middle that none of them fills."""


@dataclass(frozen=True)
class VideoWorld:
    """The settings of a set.

    Attributes:
        num_train, num_test: videos per split.
        num_frames: frames a video; of several, each in turn.
        plot: `story` or `needle` (`video_scenes`).
        num_questions: questions a video; None: 8, or 3 about a needle (all there are).
        num_colors: colours in use, 5 or 6: no two shapes of a story share one.
        cell_pixels: pixels per cell side, at least 12; a frame has twice as many.
        seconds: from one frame to the next, a multiple of 0.1.
        times: whether each frame's time text stands before it.
        pool: pictures that the needle videos of a split share.
        hf: whether to write the `datasets` folder, in which every frame is a picture of its own.
        seed: the same settings give the same files, byte for byte.
    """

    num_train: int = 2000
    num_test: int = 200
    num_frames: tuple[int, ...] = (8,)
    plot: str = "story"
    num_questions: int | None = None
    num_colors: int = 6
    cell_pixels: int = 16
    seconds: float = 1.0
    times: bool = True
    pool: int = 256
    hf: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.plot not in PLOTS:
            raise ValueError(f"plot={self.plot!r} is not known: give one of {', '.join(PLOTS)}")
        if not self.num_frames:
            raise ValueError("num_frames is empty: give at least one number of frames")
        limits = {
            "num_train": (1, 10**6), "num_test": (1, 10**6), "num_colors": (5, 6), "num_questions": (1, 64),
            "cell_pixels": (12, 512), "pool": (2, 10**4),
        }  # fmt: skip
        given = [(name, getattr(self, name), *limits[name]) for name in limits]
        given += [("num_frames", number, MIN_FRAMES, 10**5) for number in self.num_frames]
        for name, value, low, high in given:
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} is out of range: give {low} to {high}")
        if not (0 < self.seconds and abs(self.seconds * 10 - round(self.seconds * 10)) < 1e-9):
            raise ValueError(
                f"seconds={self.seconds} cannot be written in a time text: give a multiple of 0.1"
            )

    @property
    def questions(self) -> int:
        return self.num_questions or (8 if self.plot == "story" else 3)


@dataclass
class _Row:
    id: str
    video: Video
    turns: list[VideoTurn]
    names: list[str]


def write_gridworld_video(
    out_dir: str | Path, world: VideoWorld | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the set into `out_dir` and return what `meta.json` holds.

    Args:
        out_dir: folder to make.
        world: the settings.
        overwrite: replace an earlier set of videos in `out_dir`.

    Raises:
        ValueError: `out_dir` holds something else, or holds a set and not `overwrite`; a video has fewer
        questions than are asked for. ImportError: scikit-learn is missing.
    """
    world = world or VideoWorld()
    out = Path(out_dir)
    _prepare(out, overwrite)
    scenes: dict[str, Any] = {}
    rows: dict[str, list[_Row]] = {}
    for split, number in zip(SPLITS, (world.num_train, world.num_test), strict=True):
        pool = _write_pool(out, world, split, scenes)
        rows[split] = []
        for index in range(number):
            row, pictures = make_video(split, index, world, pool)
            for name, scene, png in pictures:
                scenes[name] = scene.as_json()
                path = out / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png)
            rows[split].append(row)
        _write_json(out / f"{split}.json", [_llava_row(row, world) for row in rows[split]])
    _write_json(out / "scenes.json", {"seconds": world.seconds, "pictures": scenes})
    if world.hf:
        _save_hf(out, rows, world)
    asked = {split: [(row.video, turn) for row in rows[split] for turn in row.turns] for split in rows}
    blind = blind_accuracy(*([turn for _, turn in asked[split]] for split in SPLITS))  # type: ignore[arg-type]
    settings = {**vars(world), "num_frames": list(world.num_frames), "num_questions": world.questions}
    meta = {
        "format": FORMAT, "version": FORMAT_VERSION, "settings": settings, "blind_accuracy": blind,
        "single_frame_accuracy": guess_accuracy(asked["train"], asked["test"], "single"),
        "shuffled_accuracy": guess_accuracy(asked["train"], asked["test"], "shuffled"),
    }  # fmt: skip
    _write_json(out / "meta.json", meta, indent=2)
    return meta


def make_video(
    split: str, index: int, world: VideoWorld, pool: tuple[Scene, ...] = ()
) -> tuple[_Row, list[tuple[str, Scene, bytes]]]:
    """Video `index` of a split: its row, and its own pictures (name below `images/`, scene, PNG)."""
    rng = np.random.default_rng([world.seed, len(SPLITS) + SPLITS.index(split), index])
    num_frames = world.num_frames[index % len(world.num_frames)]
    if world.plot == "story":
        video = sample_story(rng, num_frames, world.num_colors, split, world.seconds)
    else:
        video = sample_needle(rng, num_frames, world.num_colors, split, world.seconds, pool)
    turns = ask_video(video, rng, world.questions, world.plot)
    names = [f"{split}/pool/{number:04d}.png" for number in range(len(pool))]
    own = range(len(pool), len(video.states))
    names += [f"{split}/{index:06d}/{number:02d}.png" for number in range(len(own))]
    pictures = [(names[i], video.states[i], _png(video.states[i], rng, world.cell_pixels)) for i in own]
    return _Row(f"{split}-{index:06d}", video, turns, [names[i] for i in video.frames]), pictures


def _png(scene: Scene, rng: np.random.Generator, cell_pixels: int) -> bytes:
    buffer = io.BytesIO()
    draw_scene(scene, rng, cell_pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_pool(out: Path, world: VideoWorld, split: str, scenes: dict[str, Any]) -> tuple[Scene, ...]:
    if world.plot != "needle":
        return ()
    rng = np.random.default_rng([world.seed, len(SPLITS) + SPLITS.index(split)])
    pool = sample_pool(rng, world.pool, world.num_colors, split)
    (out / "images" / split / "pool").mkdir(parents=True)
    for number, scene in enumerate(pool):
        name = f"{split}/pool/{number:04d}.png"
        (out / "images" / name).write_bytes(_png(scene, rng, world.cell_pixels))
        scenes[name] = scene.as_json()
    return pool


def _prepare(out: Path, overwrite: bool) -> None:
    """Makes `out`, or empties it of an earlier set of videos; nothing else is ever removed."""
    if out.is_dir() and any(out.iterdir()):
        marker = out / "meta.json"
        if not marker.is_file() or json.loads(marker.read_text()).get("format") != FORMAT:
            raise ValueError(f"{out} is not empty and holds no gridworld of videos: give another folder")
        if not overwrite:
            raise ValueError(
                f"{out} holds a gridworld of videos already: pass overwrite=True, or give another folder"
            )
        for name in ("images", "hf"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("train.json", "test.json", "scenes.json", "meta.json"):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def _frames_text(number: int, world: VideoWorld) -> str:
    """The frames of a prompt, in LLaVA's text."""
    times = (time_text(world.seconds * frame) if world.times else "" for frame in range(number))
    return "".join(f"{when}{PLACEHOLDER}\n" for when in times)


def _llava_row(row: _Row, world: VideoWorld) -> dict[str, Any]:
    conversations = []
    for number, turn in enumerate(row.turns):
        frames = "" if number else _frames_text(len(row.names), world)
        conversations.append({"from": "human", "value": frames + turn.question})
        conversations.append({"from": "gpt", "value": turn.answer})
    types = [turn.type for turn in row.turns]
    return {"id": row.id, "image": row.names, "conversations": conversations, "types": types}


def _trl_row(row: _Row, world: VideoWorld, images: Path) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn in _llava_row(row, world)["conversations"]:
        parts = [{"text": None, **part} for part in split_placeholders(turn["value"])]
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": parts})
    read = {name: (images / name).read_bytes() for name in set(row.names)}
    return {
        "id": row.id, "messages": messages,
        "images": [{"bytes": read[name], "path": name.rsplit("/", 1)[-1]} for name in row.names],
        "types": [turn.type for turn in row.turns],
    }  # fmt: skip


def _save_hf(out: Path, rows: dict[str, list[_Row]], world: VideoWorld) -> None:
    from datasets import Dataset, DatasetDict
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    from voco_plugin.data.llava_format import vision_features

    features = vision_features(with_id=True, with_types=True)

    def dataset(split: str) -> Any:
        columns: dict[str, list[Any]] = {name: [] for name in features}
        for row in rows[split]:
            made = _trl_row(row, world, out / "images")
            for name in features:
                columns[name].append(made[name])
        return Dataset.from_dict(columns, features=features)

    quiet = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        DatasetDict({split: dataset(split) for split in rows}).save_to_disk(str(out / "hf"))
    finally:
        if quiet:
            enable_progress_bar()


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    atomic_write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
