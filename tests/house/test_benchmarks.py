"""The benchmarks run at a small size on a CPU, and say what they claim to say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import voco_plugin as vp
from paths import ROOT
from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm
from voco_plugin.gridworld.video_dataset import VideoWorld, write_gridworld_video

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.slow
def test_packing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("packing").main(["--quick", "--out", str(tmp_path / "packing.json")])
    for ways in found["attention"].values():
        padded, packed = ways["padded"], ways["packed"]
        assert packed["filled"] > 0.85 > 0.6 > padded["filled"] and packed["slots"] < padded["slots"]
        assert packed["loss_sum"] == pytest.approx(padded["loss_sum"], rel=1e-5)  # the same work was done
        assert packed["useful_tokens_a_second"] > 0
    assert (tmp_path / "packing.json").is_file()


@pytest.mark.slow
def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("cache").main(["--quick", "--out", str(tmp_path / "cache.json")])
    (first,) = found["first_token"]
    assert first["stream_tokens"] == 8 + 1 + 8 and first["ratio_to_floor"]["floor"] == 1
    # stage 2 reads one token less than the floor, and attends to as many
    assert 0.8 < first["flops"]["VoCo"] / first["flops"]["floor"] <= 1
    assert first["flops"]["no cache"] > 20 * first["flops"]["VoCo"]
    assert found["bytes_an_image"]["all vision tokens"] == 576 * found["bytes_an_image"]["VoCo"]
    assert found["bytes_an_image"]["VoCo"] == found["store"][0]["values_bytes"]
    assert all(rate > 0 for stored in found["store"] for rate in stored["a_second"].values())
    assert [point["images"] for point in found["memory"]] == [2, 4]


@pytest.mark.slow
def test_video_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("av", reason="PyAV is not installed: pip install 'voco_plugin[video]'")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("video_file").main(["--quick", "--fps", "2"])
    assert [(p["codec"], p["frames"]) for p in found["points"]] == [
        ("h264", 10), ("h264", 30), ("vp9", 10), ("vp9", 30),
    ]  # fmt: skip
    for short, long in zip(found["points"][::2], found["points"][1::2], strict=True):
        # three times the video; what Python and torch take is the same to a few per cent
        assert long["compress"]["peak_bytes"] < 1.05 * short["compress"]["peak_bytes"]


def test_a_section_of_real_weights_is_put_in_the_place_of_the_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    real = importlib.import_module("real_weights")
    (one, two) = (real.HEADING + text for text in ("\nold\n", "\nnew\n"))
    page = "# A\n\ntext\n"
    assert real.put(page, one) == page + one
    assert real.put(page + one + "\n## Next\n", two) == page + two + "\n## Next\n"
    assert real.put(page + one, two) == page + two


def test_video_stage_counts_what_was_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Accuracies by hand: two videos of 8 and 16 frames, of each two questions of order and one count."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    stage = importlib.import_module("video_stage")
    videos = [{"image": ["a.png"] * 8}, {"image": ["a.png"] * 16}]
    (tmp_path / "test.json").write_text(json.dumps(videos))
    guessed = {f"{view}_accuracy": {"first": 0.5} for view in ("blind", "single_frame", "shuffled")}
    (tmp_path / "meta.json").write_text(json.dumps(guessed))

    def answered(every: str, shuffled: str, single: str, blind: str) -> dict:
        names = ("voco", "voco frames=shuffled", "voco frames=single", "blind")
        scores = {
            name: {"correct": c} for name, c in zip(names, (every, shuffled, single, blind), strict=True)
        }
        types = ["first", "count", "where"] * 2
        return {"rows": [0, 0, 0, 1, 1, 1], "types": types, "scores": scores}

    before = answered("100000", "100000", "000001", "000000")
    after = {
        0: answered("111101", "010010", "000000", "000000"),
        1: answered("111111", "110010", "100000", "000000"),
    }
    found = stage.collect(before, after, tmp_path)
    figures = found["figures"]
    assert set(figures) == {
        "order", "first", "count", "where", "8 frames", "16 frames", "count, 8 frames", "count, 16 frames"
    }  # fmt: skip
    assert figures["order"]["questions"] == 4 and figures["count"]["questions"] == 2
    assert figures["order"]["after"]["all"]["per_seed"] == [1, 1]
    assert figures["order"]["after"]["shuffled"]["accuracy"] == pytest.approx(1 / 8)
    assert figures["order"]["after"]["all - shuffled"]["difference"] == pytest.approx(7 / 8)
    assert figures["order"]["before"]["all"]["accuracy"] == pytest.approx(1 / 4)
    assert figures["order"]["before"]["all - single"]["difference"] == pytest.approx(0)
    assert figures["count"]["after"]["all"]["per_seed"] == [0.5, 1]
    assert figures["8 frames"]["after"]["single"]["per_seed"] == [0, 0.5]
    assert figures["count, 16 frames"]["after"]["all"]["per_seed"] == [0, 1]
    assert "| order | 4 | 25.0" in stage.markdown(found)
    stage.draw(found, tmp_path, [8, 16])
    for name in ("types.png", "frames.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
    other = {**before, "rows": [0, 0, 0, 1, 1, 0]}
    with pytest.raises(ValueError, match="other questions"):
        stage.collect(other, after, tmp_path)


def test_video_needle_counts_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Scores go by number of frames and question type; the right answer counts and another does not."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    needle = importlib.import_module("video_needle")
    world = VideoWorld(plot="needle", num_train=1, num_test=4, num_frames=(8, 12), pool=6, hf=False)
    write_gridworld_video(tmp_path / "needle", world)
    rows = json.loads((tmp_path / "needle" / "test.json").read_text())
    torch.manual_seed(0)
    model, processor = build_tiny_vlm(image_size=32, patch_size=8)
    model = vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=processor).eval()
    wrong = {"needle_cell": "nowhere"}

    def ask(watching, text, **options):
        answers = [turn["value"] for turn in current["conversations"][1::2]]
        asked = [turn["value"].rpartition("\n")[2] for turn in current["conversations"][::2]]
        assert watching.report()["kept"] == len(current["image"])
        kind = current["types"][asked.index(text)]
        return wrong.get(kind, answers[asked.index(text)])

    monkeypatch.setattr("voco_plugin.inference.streaming.stream.VideoStream.ask", ask)
    found: dict = {}
    for current in rows:
        for frames, kinds in needle.accuracy(model, processor, [current], tmp_path / "needle", {}).items():
            for kind, (right, asked) in kinds.items():
                score = found.setdefault(frames, {}).setdefault(kind, [0, 0])
                score[0] += right
                score[1] += asked
    assert found == {n: {"needle": [2, 2], "needle_cell": [0, 2], "needle_half": [2, 2]} for n in ("8", "12")}
    point = {"frames": 8, "budget": None, "seconds_a_frame": 0.01, "peak_bytes_with_questions": 9000}
    needle.draw({"points": [point], "accuracy": {"none": found}}, tmp_path / "needle.png")
    with Image.open(tmp_path / "needle.png") as picture:
        assert picture.width > 800
