"""``voco generate --video``: a source, a cache file whose blocks are a video, and what a user gets wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import voco_plugin as vp
from video_harness import frames
from voco_plugin.cli import main
from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm
from voco_plugin.inference.session import VoCoSession
from voco_plugin.inference.streaming.compress_frames import compress_video

ASKED = ["--question", "What is at b2?", "--question", "How many?", "--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model, tools = build_tiny_vlm(image_size=32, vision_width=32, text_width=32, text_layers=2, text_heads=2)
    model = vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=tools)
    model.save_pretrained(path)
    return path


@pytest.fixture
def clip(tmp_path, monkeypatch) -> Path:
    """A file that a stand-in for the reader gives twelve frames of, two a second."""
    read: list[dict] = []

    def read_video(source, **options):
        read.append({"source": source, **options})
        return iter(frames(12)[: options.get("max_frames")])

    fake = SimpleNamespace(read_video=read_video, asked=read)
    monkeypatch.setitem(sys.modules, "voco_plugin.video.reading", fake)
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"video")
    return path


def result(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["generate", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def by_hand(folder: Path, kept: list[int], time_text: bool) -> list[str]:
    model, tools = vp.load(str(folder))
    watching = VoCoSession(model, tools).watch(time_text=time_text)
    for number in kept:
        watching.feed(frames(12)[number])
    return [watching.ask(q, remember=False, max_new_tokens=3) for q in ASKED[1:4:2]]


def test_a_file_within_a_budget(folder, clip, capsys):
    options = ["--fps", "2", "--end", "9", "--time-text", "--budget", "4", "--policy", "window"]
    found = result(capsys, str(folder), "--video", str(clip), *options, *ASKED)
    assert found["times"] == [0.0, 4.5, 5.0, 5.5] and found["policy"] == "window" and found["budget"] == 4
    assert (found["frames"], found["kept"], found["dropped"], found["voco_tokens"]) == (12, 4, 8, 8)
    assert [a["question"] for a in found["answers"]] == ASKED[1:4:2]
    assert [a["answer"] for a in found["answers"]] == by_hand(folder, [0, 9, 10, 11], True)
    asked = sys.modules["voco_plugin.video.reading"].asked[-1]
    assert asked["source"] == str(clip) and (asked["fps"], asked["end"], asked["count"]) == (2.0, 9.0, None)


def test_what_is_printed_names_policy_and_loss(folder, clip, capsys):
    options = ["--video", str(clip), "--frames", "12", "--budget", "3", *ASKED]
    assert main(["generate", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert f"{clip}: 12 frame(s) seen as 12 block(s), 3 kept" in out
    assert "policy uniform, budget 3 blocks: 9 dropped" in out and "  What is at b2?\n" in out


def test_blocks_of_a_cache_file_are_a_video(folder, tmp_path, capsys):
    model, tools = vp.load(str(folder))
    path = tmp_path / "clip.safetensors"
    vp.VoCoCache.cat(compress_video(model, tools, frames(12))).save(path)
    options = ["--cache", str(path), "--together", "--time-text", "--fps", "2", "--budget", "5"]
    found = result(capsys, str(folder), *options, *ASKED)
    kept = [int(t * 2) for t in found["times"]]
    assert len(kept) == 5 and kept[0] == 0 and kept[-1] == 11 and found["video"] == str(path)
    assert [a["answer"] for a in found["answers"]] == by_hand(folder, kept, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "no.mp4"], "video no.mp4 does not exist"),
        (["--video", "CLIP", "--together"], "--together is of images and caches"),
        (["--video", "CLIP", "--num-beams", "2"], "--num-beams is not for a video"),
        (["--video", "CLIP", "--policy", "merge"], "needs a budget"),
        (["--video", "CLIP", "--budget", "lots"], "neither a number of blocks nor of bytes"),
        (["--video", "CLIP", "--frames-per-block", "2"], "takes no videos"),
        (["--image", "a.png", "--fps", "1"], "--fps is of a video: give --video FILE"),
        (["--cache", "a.safetensors", "--time-text"], "or --cache FILE --together"),
        (["--cache", "a.safetensors", "--together", "--frames", "3"], "--frames is of a video"),
        (["--video", "CLIP", "--store", ".", "--fps", "1"], "--fps says how a file is read"),
        (["--store", "."], "--store answers about --name NAME, --image FILE or --video NAME"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(folder, clip, capsys, arguments, message):
    arguments = [str(clip) if a == "CLIP" else a for a in arguments]
    assert main(["generate", str(folder), *arguments, "--question", "x"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("voco")]) == 1
