"""Real processes: a run that is killed goes on where it was; processes that share the work do each image
once.

Slow: ``pytest -m slow tests/store/test_bulk_processes.py``.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import voco_plugin as vp
from bulk_runs import BATCH, COUNT, WORKER, arguments, check_whole, environment, report
from paths import HELPERS, ROOT
from photos import write_images
from voco_plugin.store.names import StoreNames

pytestmark = pytest.mark.slow


def computed(log: Path) -> int:
    """Images that went through a model, over all processes."""
    return sum(len(file.read_text().split()) for file in log.parent.glob(f"{log.name}.*"))


def finish(command: list[str], **more: str) -> dict:
    done = subprocess.run(command, env=environment(**more), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def kill_when(process: subprocess.Popen, reached) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("run", range(2))
def test_a_killed_run_goes_on_and_computes_nothing_twice(run, place, tmp_path) -> None:
    """Killed twice at random moments, then finished: over the three runs each image was computed once, but
    for the batch that was in flight at each kill."""
    log, store = tmp_path / "log", tmp_path / "store"
    command = [sys.executable, str(WORKER), str(log), "0.02", *arguments(place, store)]
    moments = sorted(random.Random(run).sample(range(2, COUNT - 2), 2))
    for moment in moments:
        process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        delay = random.Random(moment).random() * 0.1
        kill_when(process, lambda moment=moment: computed(log) >= moment)
        time.sleep(delay)
    before = computed(log)
    result = finish(command)
    total = computed(log)
    report(f"killed at {moments}: {before} computed before the last run, {result['computed']} in it")
    assert result["images"] == COUNT and result["computed"] == total - before < COUNT
    assert COUNT <= total <= COUNT + len(moments) * BATCH
    check_whole(place, store)
    assert finish(command)["computed"] == 0 and computed(log) == total


def test_two_processes_of_torchrun_share_the_work(place, tmp_path) -> None:
    log, store = tmp_path / "log", tmp_path / "store"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = finish([sys.executable, *launcher, str(WORKER), str(log), "0", *arguments(place, store)])
    assert (result["processes"], result["images"], result["computed"]) == (2, COUNT, COUNT)
    shares = [len(file.read_text().split()) for file in tmp_path.glob("log.*")]
    assert shares == [COUNT // 2] * 2
    check_whole(place, store)


def test_accelerate_launch_shares_the_work(place, tmp_path) -> None:
    """accelerate starts several processes on a machine without GPUs only for DDP profiles."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "integrations/accelerate/ddp.yaml"]
    launcher += ["--num_processes", "2", "--module", "voco_plugin"]
    result = finish([sys.executable, *launcher, *arguments(place, tmp_path / "store")])
    assert (result["processes"], result["computed"]) == (2, COUNT)
    check_whole(place, tmp_path / "store")


def test_workers_are_processes_and_one_that_fails_ends_the_others(place, tmp_path) -> None:
    command = [sys.executable, "-m", "voco_plugin", *arguments(place, tmp_path / "store", "--workers", "2")]
    result = finish(command)
    assert (result["processes"], result["computed"]) == (2, COUNT)
    check_whole(place, tmp_path / "store")
    write_images(tmp_path / "more", 4, seed=500)
    (tmp_path / "more" / "001.png").write_bytes(b"no image")
    command[command.index(str(place / "photos"))] = str(tmp_path / "more")
    failed = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and failed.stdout == ""
    assert "001.png" in failed.stderr and "Traceback" not in failed.stderr
    done = finish([*command, "--on-bad-sample", "skip"])
    assert (done["skipped_samples"], done["images"]) == (1, 4)


def test_a_new_store_may_be_made_by_several_processes_at_once(tmp_path) -> None:
    rounds, world = 40, 4
    script = str(HELPERS / "store_makers.py")
    command = [sys.executable, script, str(tmp_path), str(rounds), str(world)]
    makers = [
        subprocess.Popen([*command, str(rank)], env=environment(), stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    assert [maker.communicate()[1] for maker in makers] == [""] * world
    for number in range(rounds):
        where = tmp_path / str(number)
        with vp.VoCoCacheStore(where, readonly=True) as store, StoreNames(where, readonly=True) as names:
            assert len(store) == len(names) == world


def test_two_killed_of_two_and_a_third_alone_finishes(place, tmp_path) -> None:
    """Both processes killed half-way; one process then finishes what they left."""
    log, store = tmp_path / "log", tmp_path / "store"
    command = [sys.executable, str(WORKER), str(log), "0.05", *arguments(place, store)]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29711"}
    both = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(**world, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]  # fmt: skip
    kill_when(both[0], lambda: computed(log) >= COUNT // 2)
    both[1].kill()
    both[1].communicate()
    before = computed(log)
    result = finish(command)
    report(f"two killed after {before} computed; the third computed {result['computed']}")
    assert COUNT // 2 <= before and COUNT <= before + result["computed"] <= COUNT + 2 * BATCH
    check_whole(place, store)
