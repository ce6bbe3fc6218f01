"""`voco compress --engine ray` on a Ray of this machine, one of its workers killed half-way.

Slow: ``pytest -m slow tests/store/test_ray.py``; needs Ray: ``pip install 'voco_plugin[ray]'``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bulk_runs import COUNT, arguments, check_whole, environment, report
from paths import ROOT
from photos import write_images
from voco_plugin.cli.accelerate_launch import load_integration


def test_without_ray_the_error_says_what_to_install(monkeypatch) -> None:
    from voco_plugin.store.sources.image_items import FileImages

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'voco_plugin\[ray\]'"):
        load_integration("ray").compress_with_ray("model", FileImages(["a.png"]), "store")


def test_a_source_that_is_read_in_order_is_refused(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: voco_plugin[ray]")
    from voco_plugin.store.sources.tar_images import TarStream

    (tmp_path / "a.tgz").write_bytes(b"")
    with pytest.raises(ValueError, match="by number"):
        load_integration("ray").compress_with_ray("model", TarStream(str(tmp_path / "a.tgz")), "store")


SETUP = """
    import os, pathlib, time
    from voco_plugin.inference.mixin import VoCoGenerationMixin
    if os.environ.get("VOCO_TEST_LOG"):
        plain = VoCoGenerationMixin.compress
        def compress(self, *args, **inputs):
            rows = len(inputs["input_ids"])
            with open(f"{os.environ['VOCO_TEST_LOG']}.{os.getpid()}", "a") as stream:
                stream.write("x\\n" * rows)
                stream.flush()
            time.sleep(float(os.environ["VOCO_TEST_SECONDS"]) * rows)
            return plain(self, *args, **inputs)
        VoCoGenerationMixin.compress = compress
"""
"""A plugin file: every worker runs it, so that what it computes is counted (by process) and takes longer."""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "counting.py"
    file.write_text(textwrap.dedent(SETUP))
    return file


def counts(log: Path) -> dict[int, int]:
    """Process → images it has sent through its model."""
    return {int(f.suffix[1:]): len(f.read_text().split()) for f in log.parent.glob(f"{log.name}.*")}


@pytest.mark.slow
def test_a_killed_ray_worker_leaves_every_image_in_the_store_exactly_once(place, plugin, tmp_path) -> None:  # noqa: F811
    pytest.importorskip("ray", reason="Ray is not installed: voco_plugin[ray]")
    log, store = tmp_path / "log", tmp_path / "store"
    more = ["--engine", "ray", "--workers", "2", "--plugin", str(plugin)]
    process = subprocess.Popen(
        [sys.executable, "-m", "voco_plugin", *arguments(place, store, *more)], cwd=ROOT, text=True,
        env=environment(VOCO_TEST_LOG=str(log), VOCO_TEST_SECONDS="0.2"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while sum(counts(log).values()) < COUNT // 2 or len(counts(log)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    at_the_kill = counts(log)
    victim = max(at_the_kill, key=lambda pid: at_the_kill[pid])
    os.kill(victim, signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-4000:]
    result, by_process = json.loads(out), counts(log)
    total = sum(by_process.values())
    report(f"killed {victim} after {at_the_kill}; at the end {by_process}, {total} computed; {result}")
    assert by_process[victim] <= at_the_kill[victim] + 4  # it was dead indeed
    assert result["images"] == COUNT and result["processes"] == 2
    assert COUNT <= total <= COUNT + 4  # but for the batch in flight, nothing was computed twice
    check_whole(place, store)


@pytest.mark.slow
def test_ray_workers_resume_write_shards_and_report_bad_images(place, plugin, tmp_path) -> None:  # noqa: F811
    pytest.importorskip("ray", reason="Ray is not installed: voco_plugin[ray]")
    from voco_plugin.store.shards import read_shards

    log, url = tmp_path / "log", f"file://{tmp_path}/shards"
    write_images(tmp_path / "photos", 20)
    (tmp_path / "photos" / "007.png").write_bytes(b"no image")
    command = [
        sys.executable,
        "-m",
        "voco_plugin",
        "compress",
        str(place / "model"),
        str(tmp_path / "photos"),
    ]
    command += ["--shards", url, "--engine", "ray", "--workers", "2", "--json", "--plugin", str(plugin)]
    setting = environment(VOCO_TEST_LOG=str(log), VOCO_TEST_SECONDS="0")

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=setting, cwd=ROOT, capture_output=True, text=True)

    failed = run()
    assert failed.returncode == 2 and failed.stdout == "" and "Traceback" not in failed.stderr
    assert [line for line in failed.stderr.splitlines() if "error: image" in line and "007.png" in line]
    first = json.loads(run("--on-bad-sample", "skip").stdout)
    assert (first["images"], first["skipped_samples"]) == (20, 1)
    assert first["computed"] + first["hits"] == 19
    before = sum(counts(log).values())
    second = json.loads(run("--on-bad-sample", "skip").stdout)
    assert (second["computed"], second["hits"]) == (0, 19) and sum(counts(log).values()) == before
    assert len({item.key for item in read_shards(url)}) == 19
