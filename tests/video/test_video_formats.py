"""Video sets in their published formats become rows of frames, read when they are asked for."""

# ruff: noqa: F811  (the fixtures of another test file)

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from trainers import losses, trainer
from voco_plugin.data.images import BadImageError
from voco_plugin.video.dataset_rows import ReadFrames, VideoRow, as_dataset, is_video_set, load_video_dataset

opened: list[str] = []


def reader(path, count):
    """Folders of frames, as a stand-in for video files."""
    opened.append(str(path))
    files = sorted(Path(path).glob("*.png"))
    if not files:
        raise BadImageError(f"video {path} cannot be read: there is no such file.")
    return [Image.open(f).convert("RGB") for f in files[:: max(1, len(files) // count)][:count]]


def film(folder: Path, frames: int, shade: int) -> None:
    folder.mkdir(parents=True)
    for number in range(frames):
        Image.new("RGB", (24, 16), (shade, 10 * number, 0)).save(folder / f"{number:03}.png")


@pytest.fixture
def sets(tmp_path):
    """A CSV as WebVid's, a JSON as Video-ChatGPT's, one in LLaVA's style, and their films."""
    film(tmp_path / "videos/000001_000050/21179416.mp4", 6, 10)
    film(tmp_path / "videos/000051_000100/1066674784.mp4", 3, 200)
    with open(tmp_path / "results_2M_train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        url = "https://example.org/1.mp4"
        writer.writerow(["21179416", url, "PT00H00M11S", "000001_000050", "Red circle, moving left"])
        writer.writerow(["1066674784", url, "PT00H00M10S", "000051_000100", 'A "green" square'])
    film(tmp_path / "videos/v_k_ZXmr8pmrs", 8, 90)
    qa = [
        {"q": "What happens first?", "a": "Red comes first.", "video_id": "v_k_ZXmr8pmrs"},
        {"q": "And then?", "a": "Green.", "video_id": "v_k_ZXmr8pmrs"},
    ]
    (tmp_path / "video_chatgpt.json").write_text(json.dumps(qa))
    turns = [
        {"from": "human", "value": "Look:\n<video>\nwhat is it"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "and"},
        {"from": "gpt", "value": "blue"},
    ]
    llava = [{"id": "c1", "video": "000001_000050/21179416.mp4", "conversations": turns}]
    (tmp_path / "llava_video.json").write_text(json.dumps(llava))
    opened.clear()
    return tmp_path


def load(sets, name, count=4, **more):
    files = ",".join(str(sets / n) for n in name.split(","))
    return load_video_dataset(files, sets / "videos", reader=reader, count=count, **more)


def words(row) -> list:
    return [
        (m["role"], ["I" if p["type"] == "image" else p["text"] for p in m["content"]])
        for m in row["messages"]
    ]


def test_webvid(sets):
    found = load(sets, "results_2M_train.csv")
    assert len(found) == 2 and not opened, "nothing is decoded before its row is asked for"
    row = found[0]
    ask = "Provide a brief description of the given video."
    assert words(row) == [
        ("user", ["I", "I", "I", "I", ask]), ("assistant", ["Red circle, moving left"]),
    ]  # fmt: skip
    assert row["id"] == "21179416" and [i.getpixel((0, 0))[1] for i in row["images"]] == [0, 10, 20, 30]
    assert words(found[1])[0] == ("user", ["I", "I", "I", ask]), "as many parts as the video has frames"
    assert words(found[1])[1] == ("assistant", ['A "green" square'])


def test_video_chatgpt(sets):
    found = load(sets, "video_chatgpt.json")
    row = found[1]
    assert words(row) == [("user", ["I"] * 4 + ["And then?"]), ("assistant", ["Green."])]
    assert len(row["images"]) == 4 and opened == [str(sets / "videos/v_k_ZXmr8pmrs")]


def test_llava_style(sets):
    (row,) = (load(sets, "llava_video.json")[i] for i in range(1))
    assert words(row) == [
        ("user", ["Look:", "I", "I", "I", "I", "what is it"]), ("assistant", ["red"]), ("user", ["and"]),
        ("assistant", ["blue"]),
    ]  # fmt: skip
    assert row["id"] == "c1"


def test_several_sets_are_one(sets):
    found = load(sets, "results_2M_train.csv,video_chatgpt.json")
    ids = ["21179416", "1066674784", "v_k_ZXmr8pmrs/0", "v_k_ZXmr8pmrs/1"]
    assert [row["id"] for row in found] == ids
    assert [row["id"] for row in found.select([2, 0])] == [ids[2], ids[0]]


def test_they_are_told_from_image_sets(sets, tmp_path):
    assert all(is_video_set(sets / n) for n in ("results_2M_train.csv", "video_chatgpt.json"))
    assert is_video_set(sets / "llava_video.json")
    other = tmp_path / "llava.json"
    other.write_text(json.dumps([{"image": "a.png", "conversations": []}]))
    assert not is_video_set(other) and not is_video_set(tmp_path) and not is_video_set("org/set")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([{"q": "a", "video_id": "v"}], "record 0 has the keys q, video_id; give 'q' and 'a' as texts"),
        ([{"q": "a", "a": "b"}], "record 0: video is None"),
        ([3], "record 0 is no object"),
        ([{"video": "v", "conversations": [{"from": "human", "value": "<video> <video>"}]}], "2 <video>"),
    ],
)
def test_a_malformed_record_is_named(tmp_path, text, message):
    (tmp_path / "x.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=message):
        load_video_dataset(tmp_path / "x.json", count=4)


def test_what_is_left_out_is_named(sets, tmp_path):
    with pytest.raises(ValueError, match="give count"):
        load_video_dataset(sets / "video_chatgpt.json")
    with pytest.raises(ValueError, match="does not exist"):
        load_video_dataset(sets / "gone.json", count=1)
    (tmp_path / "x.csv").write_text("videoid,name\n1,a\n")
    with pytest.raises(ValueError, match="has no column page_dir"):
        load_video_dataset(tmp_path / "x.csv", count=1)


def test_a_video_that_is_gone_raises_by_name_or_leaves_its_place(sets, tmp_path, caplog):
    gone = VideoRow(str(sets / "gone.mp4"), (("user", "what"), ("assistant", "red")), "gone")
    with pytest.raises(BadImageError, match="row 'gone': video .*gone.mp4 cannot be read"):
        as_dataset([gone], ReadFrames({"count": 2}, reader=reader))[0]
    skipping = as_dataset([gone], ReadFrames({"count": 2}, "skip", reader))
    assert skipping[0]["images"] == [{"path": str(sets / "gone.mp4"), "bytes": b""}]
    assert "gone.mp4 cannot be read" in caplog.text


@pytest.mark.parametrize("bad", [False, True])
def test_a_video_set_trains(bases, sets, tmp_path, bad):
    names = "results_2M_train.csv,video_chatgpt.json,llava_video.json"
    skip = "skip" if bad else "raise"
    if bad:
        shutil.rmtree(sets / "videos/000051_000100")
    films = load(sets, names, count=3, on_bad_sample=skip)
    made = trainer(
        bases("llava_llama"), tmp_path / "out", films, stage1="streamed", stage1_chunk=2, max_steps=4,
        assistant_only_loss=True, on_bad_sample=skip,
    )  # fmt: skip
    made.train()
    assert len(losses(made)) == 4
    assert {e["voco_tokens_per_sample"] for e in made.state.log_history if "loss" in e} == {6.0}
