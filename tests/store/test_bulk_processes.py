"""Real processes: a run that is killed goes on where it was; processes that share the work do each image
once.

Slow: ``pytest -m slow tests/store/test_bulk_processes.py``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bulk import write_images

import tiny
import voco_plugin as vp
from tiny import processors
from voco_plugin.store.names import StoreNames, caches_by_name

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "helpers" / "bulk_worker.py"
COUNT, BATCH = 60, 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and distinct photos."""
    folder = tmp_path_factory.mktemp("bulk")
    tiny.build("llava_llama").save_pretrained(folder / "model")
    processors.processor("llava_llama").save_pretrained(folder / "model")
    write_images(folder / "photos", COUNT)
    return folder


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    return {
        **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", **more,
    }  # fmt: skip


def arguments(place: Path, store: Path, *more: str) -> list[str]:
    return [
        "compress", str(place / "model"), str(place / "photos"), "--store", str(store), "--batch-size",
        str(BATCH), "--json", *more,
    ]  # fmt: skip


def computed(log: Path) -> int:
    """Images that went through a model, over all processes."""
    return sum(len(file.read_text().split()) for file in log.parent.glob(f"{log.name}.*"))


def finish(command: list[str], **more: str) -> dict:
    done = subprocess.run(command, env=environment(**more), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def report(text: str) -> None:
    """A figure for who runs this with ``-s``."""
    sys.stderr.write(f"\n{text}\n")


def check_whole(place: Path, where: Path) -> None:
    """Every image is there exactly once, by content and by name, and what is there is right."""
    from voco_plugin.data.images import open_image
    from voco_plugin.inference.answering import compress_images

    model, processor = vp.load(str(place / "model"))
    photos = sorted((place / "photos").iterdir())
    with vp.VoCoCacheStore.for_model(where, model, readonly=True) as store:
        assert sorted(store) == sorted({store.key_of(path) for path in photos})
        checked = store.verify()
        assert checked["records"] == COUNT and checked["bad"] == [] == checked["index"]
        with StoreNames(where, readonly=True) as names:
            assert sorted(entry.name for entry in names) == sorted(map(str, photos))
        for path, cache in zip(photos, caches_by_name(store, list(map(str, photos))), strict=True):
            (alone,) = compress_images(model, processor, [open_image(path)])
            pairs = zip(alone.blocks[0].keys, cache.blocks[0].keys, strict=True)
            assert all((a - b).abs().max() < 1e-5 for a, b in pairs)


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
    script = str(ROOT / "tests" / "helpers" / "store_makers.py")
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
