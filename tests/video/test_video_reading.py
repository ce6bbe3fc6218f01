"""What is read of a video is what decoding all of it and picking gives; times, rotation, damage.

Folders, animations, live sources: ``test_video_sources.py``. Into a store: ``test_video_bulk.py``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version
from PIL import Image, ImageChops

from videos import SIZE, decode_all, on_screen, pictures, set_matrix, write_sound, write_video
from voco_plugin.video import BadVideoError, Frame, Sampling, Segment, probe, read_video, segments
from voco_plugin.video import reading as reading_module
from voco_plugin.video.decoding import VideoFile
from voco_plugin.video.packets import packet_table

pytest.importorskip("av", reason="PyAV is not installed: pip install 'voco_plugin[video]'")

FILES = {
    "h264.mp4": "libx264", "h264.mkv": "libx264", "h264.ts": "libx264", "vp9.webm": "libvpx-vp9",
    "vp8.webm": "libvpx", "mpeg4.avi": "mpeg4", "mpeg4.mp4": "mpeg4",
}  # fmt: skip
VARIABLE = [0, 40, 50, 300, 310, 900, 1000, 1700, 2600, 2640, 2650, 4000, 4040]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of ``FILES``, and one of a variable frame rate."""
    made = tmp_path_factory.mktemp("videos")
    for name, codec in FILES.items():
        write_video(made / name, codec)
    write_video(made / "vfr.mkv", images=pictures(len(VARIABLE)), times=VARIABLE, key_every=4)
    write_video(made / "vfr.mp4", images=pictures(len(VARIABLE)), times=VARIABLE, key_every=4)
    return made


@pytest.fixture
def seeks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The numbers of the frames that were gone to by seeking, a list for each reading."""
    seen: list[list[int]] = []
    real = reading_module.frames_at

    def watched(video, table, indices):
        chosen = list(indices)
        seen.append(chosen)
        return real(video, table, chosen)

    monkeypatch.setattr(reading_module, "frames_at", watched)
    return seen


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.mode == b.mode and ImageChops.difference(a, b).getbbox() is None


def check(frames: list[Frame], path: Path, expected: list[int]) -> None:
    """The frames are those of these numbers, with their times and pixels."""
    everything = decode_all(path)
    assert [f.index for f in frames] == expected
    for frame in frames:
        time, image = everything[frame.index]
        assert frame.time == pytest.approx(time, abs=1e-9)
        assert same(frame.image, image), f"frame {frame.index} has other pixels"


@pytest.mark.parametrize("name", [*FILES, "vfr.mkv", "vfr.mp4"])
def test_every_frame_is_what_plain_decoding_gives(folder: Path, name: str) -> None:
    found = list(read_video(folder / name))
    check(found, folder / name, list(range(len(VARIABLE) if "vfr" in name else 75)))


def test_times_of_a_variable_rate_are_those_written(folder: Path) -> None:
    assert [f.time for f in read_video(folder / "vfr.mkv")] == [t / 1000 for t in VARIABLE]


@pytest.mark.parametrize("name", [*FILES, "vfr.mkv"])
@pytest.mark.parametrize("fps", [0.4, 0.5, 1, 3, 7.3, 24, 29.97])
def test_fps_is_the_frame_on_screen_at_each_tick(folder: Path, name: str, fps: float) -> None:
    times = [time for time, _ in decode_all(folder / name)]
    end = times[-1] + 0.04
    ticks = [k / fps for k in range(200) if k / fps < end - 1e-9]
    check(list(read_video(folder / name, fps=fps)), folder / name, on_screen(times, ticks))


def test_times_that_a_container_rounds_are_still_those_of_the_grid(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mkv", count=30, rate=24)  # the frame of 1/24 s is at 42 ms
    check(list(read_video(path, fps=24)), path, list(range(30)))
    check(list(read_video(path, fps=12)), path, list(range(0, 30, 2)))


@pytest.mark.parametrize("name", [*FILES, "vfr.mkv"])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_count_is_the_middle_of_equal_parts(folder: Path, name: str, count: int) -> None:
    times = [time for time, _ in decode_all(folder / name)]
    end = times[-1] + 0.04
    ticks = [end * (k + 0.5) / count for k in range(count)]
    check(list(read_video(folder / name, count=count)), folder / name, on_screen(times, ticks))


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "vp9.webm", "h264.ts", "mpeg4.avi"])
def test_few_frames_are_gone_to_by_key_frames_with_the_same_result(
    folder: Path, name: str, seeks: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(self):
        raise AssertionError("decoded from the start")

    monkeypatch.setattr(VideoFile, "lazy_frames", everything)
    found = list(read_video(folder / name, fps=0.5))
    assert seeks == [[0, 50]]
    check(found, folder / name, [0, 50])


@pytest.mark.parametrize("gop", ["closed", "open"])
def test_seeking_decodes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gop: str) -> None:
    params = f"scenecut=0:bframes=3:b-adapt=0:open-gop={int(gop == 'open')}"
    path = write_video(tmp_path / "long.mp4", count=300, key_every=10, options={"x264-params": params})
    decoded: list[int] = []
    real = VideoFile.frames

    def counted(self, *args, **options):
        for frame in real(self, *args, **options):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(VideoFile, "frames", counted)
    found = list(read_video(path, count=3))
    assert [f.index for f in found] == [50, 150, 250] and len(decoded) < 40
    check(found, path, [50, 150, 250])


def test_packets_that_do_not_tell_the_frames_are_not_trusted(folder: Path, monkeypatch) -> None:
    real = packet_table

    def wrong(video):
        table = real(video)
        keep = np.arange(len(table.pts)) != 30  # as if a packet had shown nothing
        object.__setattr__(table, "pts", table.pts[keep])
        object.__setattr__(table, "key", table.key[keep])
        return table

    monkeypatch.setattr(reading_module, "packet_table", wrong)
    check(list(read_video(folder / "h264.mp4", count=5)), folder / "h264.mp4", [7, 22, 37, 52, 67])


def test_start_end_and_max_frames(folder: Path) -> None:
    path = folder / "h264.mp4"
    check(list(read_video(path, start=1.0, end=1.2)), path, [25, 26, 27, 28, 29])
    check(list(read_video(path, fps=5, start=1.1, end=2.1)), path, [27, 32, 37, 42, 47])
    check(list(read_video(path, fps=5, max_frames=3)), path, [0, 5, 10])
    check(list(read_video(path, count=2, start=1, end=2)), path, [31, 43])
    assert list(read_video(path, fps=1, start=10)) == []
    assert list(read_video(path, count=3, start=10)) == []


def test_a_late_start_is_gone_to_by_its_key_frame(tmp_path: Path, seeks: list[list[int]]) -> None:
    path = write_video(tmp_path / "long.mp4", count=200)
    check(list(read_video(path, start=6.0, end=6.2)), path, [150, 151, 152, 153, 154])
    assert seeks == [[150, 151, 152, 153, 154]]


def test_scenes_are_where_the_picture_changes(tmp_path: Path) -> None:
    colours = [(200, 30, 30)] * 10 + [(30, 200, 30)] * 12 + [(30, 30, 200)] * 8
    images = [np.full((SIZE[1], SIZE[0], 3), colour, dtype=np.uint8) for colour in colours]
    path = write_video(tmp_path / "cuts.mp4", images=images)
    check(list(read_video(path, scene=0.1)), path, [0, 10, 22])
    check(list(read_video(path, scene=0.1, max_frames=2)), path, [0, 10])
    # the first frame of the window is a scene
    check(list(read_video(path, scene=0.1, start=0.2)), path, [5, 10, 22])


def test_a_fade_changes_the_scene_at_any_frame_rate(tmp_path: Path) -> None:
    images = [np.full((SIZE[1], SIZE[0], 3), level, dtype=np.uint8) for level in range(16, 236, 4)]
    path = write_video(tmp_path / "fade.mp4", images=images)
    found = [f.index for f in read_video(path, scene=0.3)]
    assert len(found) == 3 and found[0] == 0
    assert abs(found[1] - 19) <= 1 and abs(found[2] - 39) <= 1  # 0.3 of 255 is 76.5 levels, 4 a frame


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
        ((0, -1, -1, 0), Image.Transpose.TRANSVERSE),
        ((1, 0, 0, 1), None),
    ],
)
def test_the_display_matrix_is_applied(tmp_path: Path, matrix, turn) -> None:
    path = set_matrix(write_video(tmp_path / "turned.mp4", count=3), *matrix)
    stored = decode_all(path)[0][1]
    shown = next(iter(read_video(path))).image
    assert same(shown, stored if turn is None else stored.transpose(turn))


def test_a_matrix_moves_pixels_as_its_definition_says(tmp_path: Path) -> None:
    """(x, y) goes to (a x + c y, b x + d y), then the picture is moved back to the origin."""
    image = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    image[:32, :48] = 255  # white: upper left
    path = set_matrix(write_video(tmp_path / "turned.mp4", images=[image] * 2), 0, 1, -1, 0)
    shown = np.asarray(next(iter(read_video(path))).image)
    assert shown.shape[:2] == (96, 64)
    # y goes to -x: what was above is to the right
    assert shown[24, 48].mean() > 200 and shown[24, 16].mean() < 50 and shown[72, 48].mean() < 50


def test_an_odd_angle_is_refused(tmp_path: Path) -> None:
    path = set_matrix(write_video(tmp_path / "odd.mp4", count=3), 1, 1, -1, 1)
    with pytest.raises(BadVideoError, match="odd.mp4.*degrees.*upright"):
        list(read_video(path))


# -- damage


def read_until_broken(path: Path, **sampling) -> tuple[list[Frame], BadVideoError]:
    frames: list[Frame] = []
    with pytest.raises(BadVideoError) as caught:
        for frame in read_video(path, **sampling):
            frames.append(frame)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return frames, caught.value


@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm", "vp8.webm", "faststart.mp4"])
@pytest.mark.parametrize("sampling", [{}, {"fps": 5}, {"fps": 0.5}])
def test_a_truncated_file_gives_what_is_there_and_says_where_it_ends(
    folder: Path, tmp_path: Path, name: str, sampling: dict
) -> None:
    whole = folder / name
    if name == "faststart.mp4":
        whole = write_video(tmp_path / "whole.mp4", container={"movflags": "faststart"})
    path = tmp_path / name
    data = whole.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    frames, problem = read_until_broken(path, **sampling)
    expected = {f.index: f for f in read_video(whole, **sampling)}
    assert frames and len(frames) < len(expected)
    assert all(same(f.image, expected[f.index].image) and f.time == expected[f.index].time for f in frames)
    if not sampling:
        assert [f.index for f in frames] == list(range(len(frames))) and len(frames) > 20
    assert problem.time is not None and f"{problem.time:.3f} s" in str(problem)


@pytest.mark.parametrize("between", [False, True], ids=["within packets", "between packets"])
def test_a_cut_among_frames_that_are_decoded_out_of_order_gives_none_in_anothers_place(
    tmp_path: Path, between: bool
) -> None:
    """A frame that is decoded before the one that is lost, and shown after it, is not taken for it."""
    if between and Version(version("av")) < Version("17"):
        pytest.skip("PyAV tells a container's index from 17 on")
    options = {"preset": "fast", "x264-params": "bframes=3:b-adapt=0:b-pyramid=normal"}
    whole = write_video(
        tmp_path / "whole.mp4", options=options, container={"movflags": "faststart"}, count=50
    )
    expected, data = {f.index: f for f in read_video(whole)}, whole.read_bytes()
    path, most = tmp_path / "cut.mp4", 0
    cuts = list(range(len(data) * 7 // 10, len(data) * 9 // 10, len(data) // 60))
    if between:
        with VideoFile(whole, "whole") as video:
            cuts = [entry.pos for entry in video.stream.index_entries if entry.pos > len(data) // 2]
    for cut in cuts:
        path.write_bytes(data[:cut])
        frames, problem = read_until_broken(path)
        assert "cut off" in str(problem)
        for frame in frames:
            own = expected[frame.index]
            assert frame.time == own.time and same(frame.image, own.image), (cut, frame.index)
        most = max(most, len(frames))
    assert most > 25


@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm", "vp8.webm"])
def test_count_over_a_truncated_file_says_so_in_the_end(folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = (folder / name).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    frames, problem = read_until_broken(path, count=3)
    assert len(frames) == 3 and "promise" in str(problem)


def test_an_mp4_without_its_index_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes((folder / "h264.mp4").read_bytes()[:-2000])
    frames, problem = read_until_broken(path)
    assert not frames and problem.time is None


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.mp4", "mpeg4.avi"])
@pytest.mark.parametrize("sampling", [{}, {"fps": 5}])
def test_damaged_bytes_end_the_reading_before_them(
    folder: Path, tmp_path: Path, name: str, sampling: dict
) -> None:
    data = bytearray((folder / name).read_bytes())
    middle = len(data) * 4 // 10
    data[middle : middle + 100] = np.random.default_rng(0).bytes(100)
    path = tmp_path / name
    path.write_bytes(data)
    frames, problem = read_until_broken(path, **sampling)
    expected = {f.index: f for f in read_video(folder / name, **sampling)}
    assert 0 < len(frames) < len(expected)
    assert all(f.time == expected[f.index].time for f in frames)
    assert same(frames[0].image, expected[frames[0].index].image)
    assert problem.time is not None


@pytest.mark.parametrize("what", ["empty", "text", "sound", "missing"])
def test_what_is_no_video_is_one_clear_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "clip.mp4"
    if what == "empty":
        path.touch()
    elif what == "text":
        path.write_text("no video at all\n" * 50)
    elif what == "sound":
        write_sound(path)
    words = {"text": "no video", "sound": "no video stream .1 audio", "missing": "not exist"}
    with pytest.raises(BadVideoError, match=f"clip.mp4 cannot be read: .*{words.get(what, what)}"):
        list(read_video(path))


def test_times_that_go_back_are_refused(folder: Path) -> None:
    class Back(VideoFile):
        def time_of(self, frame, index):
            return super().time_of(frame, index) - (index == 10)

    with Back(str(folder / "h264.mp4"), "back.mp4") as video, pytest.raises(BadVideoError, match="go back"):
        list(video.lazy_frames())


# -- what is asked for


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"fps": 1, "count": 2}, "two ways"),
        ({"fps": 0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"count": 0}, "count=0"),
        ({"scene": 1.5}, "scene=1.5"),
        ({"start": -1}, "start=-1"),
        ({"start": 2, "end": 1}, "end=1"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"rate": 5}, "rate=5"),
    ],
)
def test_options_are_checked_before_anything_is_read(folder: Path, sampling: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_video(folder / "h264.mp4", **sampling)


def test_segments_are_neighbours_and_the_last_may_be_shorter(folder: Path) -> None:
    frames = list(read_video(folder / "h264.mp4", fps=2.5))
    found = list(segments(iter(frames), 3))
    assert [[f.index for f in s.frames] for s in found] == [[0, 10, 20], [30, 40, 50], [60, 70]]
    assert isinstance(found[0], Segment) and (found[1].time, found[1].end) == (1.2, 2.0)
    with pytest.raises(ValueError, match="frames_per_block=0"):
        segments(frames, 0)


def test_frames_are_read_as_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = VideoFile.frames
    monkeypatch.setattr(VideoFile, "frames", lambda self: (decoded.append(f.pts) or f for f in real(self)))
    frames = read_video(folder / "h264.mp4")
    assert not decoded
    next(iter(frames))
    assert len(decoded) == 1


def test_probe_reads_headers_and_counts_when_told_to(folder: Path) -> None:
    known = probe(folder / "h264.mp4")
    assert (known.codec, known.size, known.duration, known.frames, known.fps) == ("h264", SIZE, 3.0, 75, 25.0)
    assert probe(folder / "vp9.webm").frames is None
    assert probe(folder / "vp9.webm", scan=True).frames == 75
    assert probe(folder / "vfr.mkv", scan=True).duration == pytest.approx(4.08, abs=0.002)


def test_expected_numbers_of_frames(folder: Path) -> None:
    for sampling in ({"fps": 2}, {"count": 7}, {}, {"fps": 2, "start": 1}, {"fps": 5, "max_frames": 4}):
        found = len(list(read_video(folder / "h264.mp4", **sampling)))
        assert Sampling(**sampling).expected(3.0, 75) == found
    assert Sampling(scene=0.1).expected(3.0) is None


LIKE_PROTOCOLS = ["2024-01-01T12:30:00.mp4", "pipe:1.mp4", "a|b.mp4", "concat:x.mp4", "%03d.mp4"]


@pytest.mark.parametrize("name", LIKE_PROTOCOLS)
@pytest.mark.parametrize("how", ["absolute", "relative", "dotted", "path"])
def test_a_file_may_be_named_like_a_protocol(name, how, tmp_path, monkeypatch):
    write_video(tmp_path / "plain.mp4", count=5).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    ways = {"absolute": str(tmp_path / name), "relative": name, "dotted": f"./{name}", "path": Path(name)}
    assert len(list(read_video(ways[how], count=3))) == 3
    assert probe(ways[how]).size == SIZE
