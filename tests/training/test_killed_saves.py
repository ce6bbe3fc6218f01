"""A run killed with SIGKILL inside a save: the checkpoint before it loads, resuming gives the losses of the
run that was never killed.

Each run is a process of its own that stops at one point inside the save of step 4 and is killed there. The
same runs with transformers' own saving show that the test can fail.
"""

# ruff: noqa: F811  (the fixtures of test_training)
from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

import voco_plugin as vp
from paths import HELPERS, ROOT
from trainers import losses, snapshot, trainer
from voco_plugin.training import checkpoints
from voco_plugin.training.checkpoints import AtomicCheckpoints

pytestmark = pytest.mark.slow

OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
POINTS = ("weights", "optimizer", "state", "rename", "rotation")


def stop_here(marker: Path) -> None:
    """Say that the point is reached, and wait to be killed."""
    marker.touch()
    time.sleep(600)


def halve(path: str | os.PathLike) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def arm(point: str, marker: Path, folder: str = "checkpoint-4") -> None:
    """Make this process stop inside the save of ``folder``: the file being written is half there."""
    import peft.peft_model
    import transformers.modeling_utils
    from transformers.trainer_callback import TrainerState

    if point == "weights":
        for module in (peft.peft_model, transformers.modeling_utils):
            save = module.safe_save_file

            def half(tensors, path, *args, _save=save, **kwargs):
                _save(tensors, path, *args, **kwargs)
                if folder in str(path):
                    halve(path)
                    stop_here(marker)

            module.safe_save_file = half
    elif point == "optimizer":
        save_any = torch.save

        def half_state(value, path, *args, **kwargs):
            save_any(value, path, *args, **kwargs)
            if str(path).endswith(f"{folder}/optimizer.pt"):
                halve(path)
                stop_here(marker)

        torch.save = half_state
    elif point == "state":
        save_state = TrainerState.save_to_json

        def no_state(self, path):
            if folder in str(path):
                stop_here(marker)
            save_state(self, path)

        TrainerState.save_to_json = no_state
    elif point == "rename":
        rename = os.rename

        def no_rename(source, target, *args, **kwargs):
            if str(target).endswith(folder):
                stop_here(marker)
            rename(source, target, *args, **kwargs)

        os.rename = no_rename
    else:
        assert point == "rotation"
        rmtree = shutil.rmtree

        def half_gone(path, *args, **kwargs):
            if str(path).endswith("checkpoint-2") and os.path.isdir(path):
                os.unlink(os.path.join(path, "optimizer.pt"))
                stop_here(marker)
            rmtree(path, *args, **kwargs)

        shutil.rmtree = half_gone


def with_stock_saves(made) -> None:
    """Give a trainer the saving of transformers and TRL back."""
    own = ("train", "_get_output_dir", "_save_checkpoint", "_push_from_checkpoint", "_finalize_training")
    kind = type(made)
    stock = {name: getattr(SFTTrainer, name) for name in own}

    def save(self, output_dir=None, state_dict=None):
        Trainer._save(self, output_dir, state_dict)

    made.__class__ = type("Stock", (kind,), {**stock, "_save": save})


def killed(base: str, out: Path, rows, peft: bool, point: str, stock: bool = False) -> None:
    """Train in another process until ``point``, then SIGKILL it."""
    marker = out.parent / "reached"

    def work() -> None:
        made = trainer(base, out, rows, peft=peft, **OPTIONS)
        if stock:
            with_stock_saves(made)
        arm(point, marker)
        made.train()

    run(work, marker)


def run(work, marker: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        end = time.monotonic() + 300
        while not marker.exists():
            assert process.is_alive(), f"the run ended (exit code {process.exitcode}) before the point"
            assert time.monotonic() < end, "the point was not reached"
            time.sleep(0.02)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -9
    marker.unlink()


@pytest.fixture(scope="module")
def whole(bases, data, tmp_path_factory):
    """The losses and the end of runs that nobody kills, with and without an adapter."""
    found = {}
    for peft in (True, False):
        made = trainer(bases("llava_llama"), tmp_path_factory.mktemp("whole"), data, peft=peft, **OPTIONS)
        made.train()
        found[peft] = (losses(made), snapshot(made))
        assert len(found[peft][0]) == 6
    return found


@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "whole model"])
@pytest.mark.parametrize("point", POINTS)
def test_after_a_kill_the_checkpoint_loads_and_resuming_gives_the_uninterrupted_losses(
    point,
    peft,
    bases,
    data,
    tmp_path,
    whole,
) -> None:
    base, out = bases("llava_llama"), tmp_path / "run"
    killed(base, out, data, peft, point)
    last = Path(get_last_checkpoint(str(out)))
    assert last.name == ("checkpoint-4" if point == "rotation" else "checkpoint-2")
    model, processor = vp.load(last)
    assert vp.is_attached(model) and processor is not None
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == int(last.name[-1])
    resumed = trainer(base, out, data, peft=peft, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    expected, end = whole[peft]
    assert losses(resumed) == expected
    assert all(torch.equal(end[name], value) for name, value in snapshot(resumed).items())
    left = sorted(p.name for p in out.iterdir() if p.is_dir())
    assert left == ["checkpoint-6"], "what the killed save left is gone"


@pytest.mark.parametrize("point", ["weights", "optimizer", "state"])
def test_with_stock_saves_the_same_kill_breaks_resuming(point, bases, data, tmp_path) -> None:
    base, out = bases("llava_llama"), tmp_path / "run"
    killed(base, out, data, True, point, stock=True)
    assert Path(get_last_checkpoint(str(out))).name == "checkpoint-4", "the half-written one is picked"
    resumed = trainer(base, out, data, **OPTIONS)
    with pytest.raises(Exception):  # noqa: B017  (whatever the loader of the broken file raises)
        resumed.train(resume_from_checkpoint=True)


def test_a_kill_between_the_two_renames_of_a_replaced_checkpoint_loses_nothing(
    bases,
    data,
    tmp_path,
    caplog,
) -> None:
    base, out, marker = bases("llava_llama"), tmp_path / "run", tmp_path / "reached"
    options = {**OPTIONS, "max_steps": 2}
    first = trainer(base, out, data, **options)
    first.train()
    before = load_file(out / "checkpoint-2" / "adapter_model.safetensors")

    def work() -> None:
        again = trainer(base, out, data, learning_rate=0.5, **{k: v for k, v in options.items()})
        rename, seen = os.rename, []

        def second(source, target, *args, **kwargs):
            seen.append(str(target))
            if len([t for t in seen if t.endswith("/checkpoint-2")]) == 2:
                stop_here(marker)
            rename(source, target, *args, **kwargs)

        os.rename = second
        again.train()

    run(work, marker)
    assert get_last_checkpoint(str(out)) is None
    resumed = trainer(base, out, data, max_steps=3)
    with caplog.at_level("WARNING"):
        resumed.train(resume_from_checkpoint=True)
    assert "put back" in caplog.text and "unfinished save" in caplog.text
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["checkpoint-2"] and len(losses(resumed)) == 3
    after = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("moved", [0, 1, 3])
@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "whole model"])
def test_a_model_that_is_half_in_its_place_does_not_load_and_the_next_start_finishes_it(
    moved,
    peft,
    bases,
    data,
    tmp_path,
) -> None:
    base, out, marker = bases("llava_llama"), tmp_path / "run", tmp_path / "reached"
    made = trainer(base, out, data, peft=peft, max_steps=1)
    made.save_model(str(out))
    vp.load(out)  # a former model is there

    def work() -> None:
        made.train()
        replace, seen = os.replace, []

        def limited(source, target, *args, **kwargs):
            if checkpoints.MODEL_WHOLE in str(source):
                seen.append(target)
                if len(seen) > moved:
                    stop_here(marker)
            replace(source, target, *args, **kwargs)

        os.replace = limited
        made.save_model(str(out))

    run(work, marker)
    with pytest.raises((OSError, ValueError)):
        vp.load(out)
    assert any("in place now" in line for line in checkpoints.recover(out))
    model, _ = vp.load(out)
    made.train()  # what the killed process had trained
    trained = {n: p for n, p in made.model.state_dict().items()}
    found = model.state_dict()
    assert trained.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    assert not [p for p in out.iterdir() if p.name.startswith("_")]


def test_a_model_killed_while_it_is_written_leaves_the_former_one(bases, data, tmp_path) -> None:
    base, out, marker = bases("llava_llama"), tmp_path / "run", tmp_path / "reached"
    made = trainer(base, out, data, max_steps=1)
    made.save_model(str(out))
    before = load_file(out / "adapter_model.safetensors")

    def work() -> None:
        made.train()
        arm("weights", marker, folder=checkpoints.MODEL_STAGING)
        made.save_model(str(out))

    run(work, marker)
    vp.load(out)
    after = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(after[k], before[k]) for k in before)
    checkpoints.recover(out)
    assert not (out / checkpoints.MODEL_STAGING).exists()


def test_the_best_checkpoint_is_named_by_its_place_and_survives_rotation(
    bases, data, tmp_path, monkeypatch
) -> None:
    options = {**OPTIONS, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {
        "metric_for_best_model": "loss",
        "eval_dataset": data.select(range(2)),
        "greater_is_better": True,
    }
    made = trainer(bases("llava_llama"), tmp_path, data, **options)
    assert isinstance(made, AtomicCheckpoints)
    rmtree, deleted = shutil.rmtree, []

    def watched(path, *args, **kwargs):
        deleted.extend([Path(path).name] if os.path.isdir(path) else [])
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    made.train()
    assert deleted and all(name.startswith("_") for name in deleted), "its name goes first, then its files"
    assert made.state.best_global_step < 6 and "_discarded-checkpoint-6" in deleted, (
        "the end deletes the last"
    )
    best = made.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{made.state.best_global_step}") and os.path.isdir(best)
    recorded = json.loads(Path(best, "trainer_state.json").read_text())["best_model_checkpoint"]
    assert recorded == best
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [Path(best).name], "save_total_limit=1"


def test_a_failed_save_leaves_no_checkpoint_and_says_why(bases, data, tmp_path, monkeypatch) -> None:
    made = trainer(bases("llava_llama"), tmp_path, data, **OPTIONS)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        made.train()
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def launch(*arguments: object) -> subprocess.Popen:
    """``killed_processes.py`` in two processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    worker = HELPERS / "killed_processes.py"
    command = [sys.executable, *start, f"--master_port={port}", str(worker)]
    paths = [str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([*command, *map(str, arguments)], env=env, start_new_session=True)


def test_two_processes_killed_in_a_save_resume_to_the_same_losses(bases, data, tmp_path) -> None:
    base, rows = bases("llava_llama"), tmp_path / "rows"
    data.save_to_disk(rows)
    assert launch(base, rows, tmp_path / "whole").wait(300) == 0
    out, marker = tmp_path / "run", tmp_path / "run.reached"
    processes = launch(base, rows, out, 4)
    try:
        end = time.monotonic() + 300
        while not marker.exists():
            assert processes.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(1)  # process 0 must not give the checkpoint its name without process 1
    finally:
        os.killpg(processes.pid, signal.SIGKILL)
        processes.wait()
        for folder in Path("/proc").glob("[0-9]*"):  # the workers lead groups of their own
            with contextlib.suppress(OSError):
                if str(out).encode() in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
    assert Path(get_last_checkpoint(str(out))).name == "checkpoint-2"
    assert launch(base, rows, out).wait(300) == 0
    expected, found = (json.loads((tmp_path / f"{n}.losses").read_text()) for n in ("whole", "run"))
    assert found == expected and len(found) == 6
    (last,) = [p for p in out.iterdir() if p.is_dir()]
    assert last.name == "checkpoint-6"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {p.name for p in last.iterdir()}
