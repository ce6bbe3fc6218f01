"""Videos through ``voco compress`` into stores and cache files, and back by name: the blocks are those of the
frames compressed one by one, in order."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import tiny
import voco_plugin as vp
from tiny import processors
from videos import write_video
from voco_plugin.cli import main
from voco_plugin.data.images import BadImageError
from voco_plugin.inference.answering import compress_images
from voco_plugin.store.bulk import compress_dataset
from voco_plugin.store.names import StoreNames, caches_by_name
from voco_plugin.store.sources.image_sources import image_source
from voco_plugin.store.sources.video_sources import VideoOptions, frame_name, video_source
from voco_plugin.store.video_series import Series, all_series, read_series, write_series
from voco_plugin.video import Sampling, read_video

pytest.importorskip("av", reason="PyAV is not installed: pip install 'voco_plugin[video]'")

NAME = "llava_llama"
K = 1  # what vp.load gives a model by itself
SECOND = VideoOptions(Sampling(fps=2))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    """A tiny model with VoCo on, its processor, and the folder both load from."""
    folder = tmp_path_factory.mktemp("model")
    tiny.build(NAME).save_pretrained(folder)
    processors.processor(NAME).save_pretrained(folder)
    model, processor = vp.load(str(folder))
    return model, processor, folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a.mp4 (2 s), b.webm (1 s) and cut.mkv, which breaks off at half of its 3 s."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", count=50)
    write_video(folder / "b.webm", "libvpx-vp9", count=25)
    whole = write_video(folder / "cut.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    return folder


def one_by_one(loaded, path: Path, **sampling) -> list:
    model, processor, _ = loaded
    images = [frame.image for frame in read_video(path, **sampling)]
    return list(compress_images(model, processor, images, batch_size=1))


def assert_same(cache, expected: list) -> None:
    assert len(cache) == len(expected)
    for block, one in zip(cache, expected, strict=True):
        for a, b in zip(
            (*block.keys, *block.values), (*one.blocks[0].keys, *one.blocks[0].values), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_video_in_a_store_is_found_whole_and_in_order(loaded, clips: Path, tmp_path: Path) -> None:
    model, processor, _ = loaded
    store = tmp_path / "store"
    result = compress_dataset(
        model,
        processor,
        video_source([str(clips / "a.mp4"), str(clips / "b.webm")], SECOND),
        store,
        batch_size=3,
    )
    assert result["images"] == 6 == result["computed"]
    with vp.VoCoCacheStore.for_model(store, model) as opened:
        whole, last = caches_by_name(opened, [str(clips / "a.mp4"), f"{clips}/b.webm#0.480s"])
    assert_same(whole, one_by_one(loaded, clips / "a.mp4", fps=2))
    assert_same(last, one_by_one(loaded, clips / "b.webm", fps=2)[1:])
    series = read_series(store, str(clips / "a.mp4"), K)
    assert series is not None and series.broken is None and series.sampling == "fps=2"
    assert series.times == (0.0, 0.48, 1.0, 1.48)
    assert series.frames[1] == f"{clips}/a.mp4#0.480s"


def test_a_second_run_computes_nothing_and_another_sampling_only_what_is_new(
    loaded, clips: Path, tmp_path: Path
) -> None:
    model, processor, _ = loaded
    path, store = str(clips / "a.mp4"), tmp_path / "store"
    compress_dataset(model, processor, video_source([path], SECOND), store)
    again = compress_dataset(model, processor, video_source([path], SECOND), store)
    assert (again["computed"], again["by_name"]) == (0, 4)
    more = compress_dataset(model, processor, video_source([path], VideoOptions(Sampling(fps=5))), store)
    assert more["images"] == 10 and more["by_name"] == 2  # those at 0 and 1 s
    with vp.VoCoCacheStore.for_model(store, model) as opened:
        (cache,) = caches_by_name(opened, [path])
    assert_same(cache, one_by_one(loaded, clips / "a.mp4", fps=5))


def test_a_broken_video_raises_or_keeps_what_is_before_the_damage(
    loaded, clips: Path, tmp_path: Path
) -> None:
    model, processor, _ = loaded
    path = str(clips / "cut.mkv")
    with pytest.raises(BadImageError, match="cut.mkv cannot be read beyond"):
        compress_dataset(model, processor, video_source([path], SECOND), tmp_path / "first")
    source = video_source([path, str(clips / "b.webm"), "gone.mp4"], SECOND, missing=True)
    left: list[str] = []
    result = compress_dataset(
        model, processor, source, tmp_path / "store", on_bad_sample="skip",
        refused=lambda name, reason: left.append(name),
    )  # fmt: skip
    assert left == [path, "gone.mp4"] and result["skipped"] == 2
    series = read_series(tmp_path / "store", path, K)
    assert series is not None and series.times[0] == 0 and 2 <= len(series.times) < 6
    assert series.broken is not None and "cannot be read beyond" in series.broken
    with vp.VoCoCacheStore.for_model(tmp_path / "store", model) as opened:
        assert len(caches_by_name(opened, [path])[0]) == len(series.times)
    assert {s.name for s in all_series(tmp_path / "store")} == {path, str(clips / "b.webm")}


def test_processes_take_turns_by_videos(clips: Path) -> None:
    videos = [str(clips / "a.mp4"), str(clips / "b.webm")]
    source = video_source(videos, SECOND)
    shares = [[item.series for item in source.share(rank, 2)] for rank in range(2)]
    assert shares == [[videos[0]] * 4, [videos[1]] * 2]
    assert [source.about(rank, 2) for rank in range(2)] == [4, 2] and source.about(0, 1) == 6
    assert source.share_length(0, 1) is None
    assert video_source(videos, VideoOptions(Sampling(scene=0.1))).about(0, 1) is None


def test_items_hold_no_picture_until_they_are_opened(clips: Path, monkeypatch) -> None:
    from voco_plugin.video.decoding import VideoFile

    made: list[int] = []
    real = VideoFile.picture
    monkeypatch.setattr(VideoFile, "picture", lambda self, frame: made.append(1) or real(self, frame))
    items = list(video_source([str(clips / "a.mp4")], SECOND))
    assert len(items) == 4 and not made
    assert items[2].open().size == (96, 64) and items[2].time == 1.0 and len(made) == 1


def test_frames_less_than_a_millisecond_apart_have_names_of_their_own(tmp_path: Path) -> None:
    path = write_video(tmp_path / "fast.mp4", count=4, rate=3000)
    names = [item.name for item in video_source([str(path)], VideoOptions(Sampling()))]
    frames = [frame_name(str(path), 0.0), f"{path}#0.000333s", f"{path}#0.001s", f"{path}#0.001000s"]
    assert names in (frames[:3], frames), "PyAV before 19 gives three of the four"


def test_a_folder_is_its_videos_or_the_frames_of_one(clips: Path, tmp_path: Path) -> None:
    from PIL import Image

    assert [Path(v).name for v in video_source([str(clips)], SECOND).videos] == ["a.mp4", "b.webm", "cut.mkv"]
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in (1, 2, 10):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(frames / f"{number}.png")
    source = video_source([str(frames)], VideoOptions(Sampling(fps=2), rate=2))
    assert [item.name for item in source] == [f"{frames}#{t}s" for t in ("0.000", "0.500", "1.000")]
    os.link(clips / "a.mp4", frames / "a.mp4")
    with pytest.raises(ValueError, match="videos and images"):
        video_source([str(frames)], SECOND)
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        video_source(["none.mp4"], SECOND)


def test_series_files_are_checked(tmp_path: Path) -> None:
    series = Series("a.mp4", 2, ("a.mp4#0.000s",), (0.0,), "fps=1")
    write_series(tmp_path, series)
    assert read_series(tmp_path, "a.mp4", 2) == series and read_series(tmp_path, "a.mp4", 1) is None
    (file,) = (tmp_path / "series").iterdir()
    for text in ("{", "[]", file.read_text().replace('"format": 1', '"format": 9'), '{"format": 1}'):
        file.write_text(text)
        with pytest.raises(vp.VoCoCacheError, match="series"):
            read_series(tmp_path, "a.mp4", 2)


# -- the command line


def test_compress_and_generate_by_the_name_of_a_video(loaded, clips: Path, tmp_path: Path, capsys) -> None:
    model_folder, video, store = str(loaded[2]), str(clips / "a.mp4"), str(tmp_path / "store")
    assert main(["compress", model_folder, video, "--fps", "2", "--store", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 4
    ask = ["generate", model_folder, "--store", store, "--question", "what is it", "--max-new-tokens", "3"]
    assert main([*ask, "--name", video, "--json"]) == 0
    (of_video,) = json.loads(capsys.readouterr().out)
    names = [word for t in ("0.000", "0.480", "1.000", "1.480") for word in ("--name", f"{video}#{t}s")]
    assert main([*ask, *names, "--together", "--json"]) == 0
    (of_frames,) = json.loads(capsys.readouterr().out)
    assert of_video["answer"] == of_frames["answer"] and of_video["image"] == video
    assert main([*ask, "--name", video + "x"]) == 2
    assert "a.mp4" in capsys.readouterr().err


@pytest.mark.parametrize("single", [True, False])
def test_compress_videos_to_cache_files(loaded, clips: Path, tmp_path: Path, capsys, single: bool) -> None:
    out = tmp_path / ("all.safetensors" if single else "caches")
    command = ["compress", str(loaded[2]), str(clips / "a.mp4"), str(clips / "b.webm"), "--count", "3"]
    assert main([*command, "--out", str(out), "--batch-size", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [Path(n).name for n in result["images"]][:2] == ["a.mp4#0.320s", "a.mp4#1.000s"]
    a, b = (one_by_one(loaded, clips / name, count=3) for name in ("a.mp4", "b.webm"))
    if single:
        assert_same(vp.VoCoCache.load(out), a + b)
    else:
        assert sorted(p.name for p in out.iterdir()) == ["a.safetensors", "b.safetensors"]
        assert_same(vp.VoCoCache.load(out / "b.safetensors"), b)


def test_compress_to_files_skips_what_is_broken(loaded, clips: Path, tmp_path: Path, capsys) -> None:
    command = ["compress", str(loaded[2]), str(clips / "cut.mkv"), "--fps", "2", "--out"]
    assert main([*command, str(tmp_path / "a.safetensors")]) == 2
    assert "beyond" in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()
    assert main([*command, str(tmp_path / "a.safetensors"), "--on-bad-sample", "skip", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["skipped_samples"] == 1 and len(result["images"]) == len(
        vp.VoCoCache.load(tmp_path / "a.safetensors")
    )


def test_an_image_named_twice_is_still_two_blocks(loaded, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16), (ord(name[0]), 9, 9)).save(tmp_path / name)
    names = [str(tmp_path / n) for n in ("a.png", "b.png", "a.png")]
    assert main(["compress", str(loaded[2]), *names, "--out", str(tmp_path / "c.safetensors")]) == 0
    assert len(vp.VoCoCache.load(tmp_path / "c.safetensors")) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "say which frames"),
        (["--start", "1"], "--start is of videos"),
        (["--frames-per-block", "2"], "--frames-per-block is of videos"),
        (["--fps", "1", "--frames-per-block", "2"], "a block each"),
        (["--fps", "1", "--every-frame"], "leave out --fps"),
        (["--fps", "1", "--count", "2"], "two ways"),
        (["--fps", "0"], "--fps 0"),
        (["--fps", "1", "--split", "train"], "--split"),
    ],
)
@pytest.mark.parametrize("to", ["--store", "--out"])
def test_wrong_options_are_one_line(clips: Path, tmp_path: Path, capsys, options, words, to) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert main(["compress", str(model), str(clips / "a.mp4"), *options, to, str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_video_among_images_is_not_opened_as_one(clips: Path) -> None:
    with pytest.raises(ValueError, match="is a video"):
        image_source(str(clips / "a.mp4"))


def test_names_of_a_store_stay_a_plain_list(loaded, clips: Path, tmp_path: Path) -> None:
    model, processor, _ = loaded
    compress_dataset(model, processor, video_source([str(clips / "b.webm")], SECOND), tmp_path / "store")
    with StoreNames(tmp_path / "store", readonly=True) as names:
        assert sorted(e.name for e in names) == [f"{clips}/b.webm#{t}s" for t in ("0.000", "0.480")]
