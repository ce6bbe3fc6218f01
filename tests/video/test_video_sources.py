"""Sources that are no plain file: folders, lists, animated images, files that grow, streams, cameras."""

from __future__ import annotations

import http.server
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from videos import pictures, write_video
from voco_plugin.data.images import open_image
from voco_plugin.video import BadVideoError, probe, read_video
from voco_plugin.video.image_sequence import natural_key
from voco_plugin.video.live import GrowingFile


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.mode == b.mode and ImageChops.difference(a, b).getbbox() is None


def images(count: int) -> list[Image.Image]:
    return [Image.fromarray(values) for values in pictures(count, (16, 12))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """frame1.png … frame12.png, a text file and a hidden image."""
    made = tmp_path / "frames"
    made.mkdir()
    for number, image in enumerate(images(12), start=1):
        image.save(made / f"frame{number}.png")
    (made / "notes.txt").write_text("no frame")
    images(1)[0].save(made / ".hidden.png")
    return made


def test_a_folder_is_read_in_natural_order_at_the_rate_given(folder: Path) -> None:
    found = list(read_video(folder, rate=4))
    assert [f.time for f in found] == [n / 4 for n in range(12)] and [f.index for f in found] == list(
        range(12)
    )
    assert all(same(f.image, image) for f, image in zip(found, images(12), strict=True))
    assert [f.index for f in read_video(folder, rate=4, fps=1)] == [0, 4, 8]
    assert [f.index for f in read_video(folder, fps=0.5)] == [0, 2, 4, 6, 8, 10]  # one a second by itself
    assert [f.index for f in read_video(folder, rate=4, count=3)] == [2, 6, 10]


def test_natural_order() -> None:
    names = ["a10.png", "A2.png", "a2b1.png", "a2b10.png", "a2b2.png", "10.png", "9.png", "a.png"]
    assert sorted(names, key=natural_key) == [
        "9.png", "10.png", "A2.png", "a2b1.png", "a2b2.png", "a2b10.png", "a10.png", "a.png",
    ]  # fmt: skip


def test_a_list_of_paths_and_images(folder: Path) -> None:
    mixed = [str(folder / "frame3.png"), folder / "frame1.png", images(1)[0]]
    found = list(read_video(mixed, rate=2))
    assert [f.time for f in found] == [0, 0.5, 1]
    assert same(found[0].image, open_image(folder / "frame3.png")) and same(found[2].image, images(1)[0])


def test_a_broken_frame_ends_the_sequence_after_those_before_it(folder: Path) -> None:
    (folder / "frame3.png").write_bytes((folder / "frame3.png").read_bytes()[:60])
    frames = []
    with pytest.raises(BadVideoError, match="beyond 0.250 s: frame 2: .*frame3.png"):
        for frame in read_video(folder, rate=4):
            frames.append(frame.index)
    assert frames == [0, 1]


def test_a_folder_without_images_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadVideoError, match="holds no image"):
        list(read_video(tmp_path))
    with pytest.raises(ValueError, match="list of no images"):
        read_video([])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animated_image_keeps_its_durations(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    first, *rest = images(5)
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(path, save_all=True, append_images=rest, duration=[100, 20, 300, 40, 500], **options)
    found = list(read_video(path))
    assert [f.time for f in found] == [0, 0.1, 0.12, 0.42, 0.46]
    if suffix != "gif":  # a palette of 256 colours
        assert all(same(f.image, image) for f, image in zip(found, images(5), strict=True))
    assert len({f.image.tobytes() for f in found}) == 5
    assert [f.index for f in read_video(path, fps=5)] == [
        0,
        2,
        4,
    ]  # 0, 0.2, 0.4 shows frame 2 again, 0.6, 0.8
    assert [f.index for f in read_video(path, count=2)] == [2, 4]  # of 0.96 s: 0.24 and 0.72
    assert probe(path).duration == pytest.approx(0.96) and probe(path).frames == 5


def test_a_gif_without_durations_runs_as_in_a_browser(tmp_path: Path) -> None:
    first, *rest = images(3)
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=0)
    assert [f.time for f in read_video(tmp_path / "a.gif")] == [0, 0.1, 0.2]


def test_a_still_image_is_one_frame(tmp_path: Path) -> None:
    images(1)[0].save(tmp_path / "a.png")
    assert [(f.time, f.index) for f in read_video(tmp_path / "a.png", fps=1)] == [(0, 0)]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_truncated_animation_gives_what_is_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    first, *rest = images(8)
    first.save(path, save_all=True, append_images=rest, duration=50)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames = []
    with pytest.raises(BadVideoError, match=f"moving.{suffix}"):
        for frame in read_video(path):
            frames.append(frame)
    # a WebP is checked as a whole before its first frame
    assert len(frames) < 8 and (frames or suffix == "webp")


def test_an_empty_animation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gif").touch()
    with pytest.raises(BadVideoError, match="empty"):
        read_video(tmp_path / "a.gif")


# -- live


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "codec"), [("clip.mkv", "libx264"), ("clip.ts", "libx264")])
def test_a_growing_file_is_followed_to_its_end(tmp_path: Path, name: str, codec: str) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    data = write_video(tmp_path / f"whole_{name}", codec).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[:2000])

    def grow() -> None:
        with open(path, "ab", buffering=0) as file:
            for start in range(2000, len(data), 8000):
                time.sleep(0.01)
                file.write(data[start : start + 8000])

    writer = threading.Thread(target=grow)
    writer.start()
    found = list(read_video(path, follow=2.0))
    writer.join()
    whole = list(read_video(tmp_path / f"whole_{name}"))
    assert [(f.time, f.index) for f in found] == [(f.time, f.index) for f in whole]
    assert all(same(a.image, b.image) for a, b in zip(found, whole, strict=True))


def test_following_waits_for_patience_and_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"abc")
    file = GrowingFile(str(path), patience=0.2, poll=0.01)
    assert file.read(10) == b"abc"
    start = time.monotonic()
    assert file.read(10) == b"" and 0.15 < time.monotonic() - start < 5
    threading.Timer(0.05, lambda: path.write_bytes(b"abcdef")).start()
    assert file.read(10) == b"def"
    file.close()


def test_frames_come_before_the_stream_ends(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    data = write_video(tmp_path / "whole.ts", count=200).read_bytes()
    path = tmp_path / "clip.ts"
    path.write_bytes(data[: len(data) * 3 // 4])
    frames = iter(read_video(path, follow=30.0, fps=5))
    start = time.monotonic()
    assert [next(frames).index for _ in range(5)] == [0, 5, 10, 15, 20]
    assert time.monotonic() - start < 25  # seconds below its patience
    frames.close()


def test_a_url_is_read_as_a_stream(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    write_video(tmp_path / "clip.ts", count=30)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert [f.index for f in read_video(f"{url}/clip.ts", fps=5)] == [0, 5, 10, 15, 20, 25]
        with pytest.raises(BadVideoError, match="http://127.0.0.1.*cannot be read"):
            list(read_video(f"{url}/none.ts"))
        with pytest.raises(ValueError, match="count=3 .* is live"):
            read_video(f"{url}/clip.ts", count=3)
    finally:
        server.shutdown()


def test_a_stream_that_is_joined_in_the_middle_begins_with_its_first_whole_frame(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    data = write_video(tmp_path / "whole.ts", count=75).read_bytes()
    cut = len(data) // 4 // 188 * 188
    path = tmp_path / "clip.ts"
    path.write_bytes(data[:376] + data[cut:])  # the tables, then the middle of a group
    found = list(read_video(path, follow=0.3))
    assert found and found[0].time == 0
    whole = {f.image.tobytes() for f in read_video(tmp_path / "whole.ts")}
    assert found[-1].image.tobytes() in whole


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        (99, {}, BadVideoError, "camera 99"),
        (-1, {}, ValueError, "camera -1"),
        (0, {"follow": 2.0}, ValueError, "follow"),
        ("none.ts", {"follow": 2.0}, BadVideoError, "none.ts.*not exist"),
        ({"a": 1}, {}, ValueError, "a dict is no video"),
    ],
)
def test_live_sources_that_are_not_there(source, options, error, words) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    with pytest.raises(error, match=words):
        list(read_video(source, **options))


def test_options_that_mean_nothing_for_a_source_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="options are FFmpeg's"):
        read_video(folder, options={"a": "b"})
    with pytest.raises(ValueError, match="follow=2"):
        read_video([images(1)[0]], follow=2)
    with pytest.raises(ValueError, match="rate=0"):
        read_video(folder, rate=0)
    with pytest.raises(ValueError, match="follow=0"):
        (tmp_path / "a.ts").write_bytes(b"x")
        list(read_video(tmp_path / "a.ts", follow=0))


def test_without_pyav_a_video_file_says_what_to_install(tmp_path: Path, monkeypatch, folder: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"voco_plugin\[video\]"):
        list(read_video(tmp_path / "a.mp4"))
    assert len(list(read_video(folder))) == 12  # what needs no FFmpeg needs no PyAV


def test_a_password_in_a_url_is_not_shown() -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    with pytest.raises(BadVideoError) as caught:
        list(read_video("http://user:secret@127.0.0.1:9/a.ts"))
    assert "secret" not in str(caught.value)
