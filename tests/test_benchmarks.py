"""The benchmarks run at a small size on a CPU, and say what they claim to say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


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
