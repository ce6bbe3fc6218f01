"""Many processes train as one: the same losses, checkpoints that load in one process, a resume that shows
nothing. (What a launch is refused for: ``test_launch.py``.)

The runs start real processes (gloo, CPU) and are slow:
``pytest -m slow tests/training/test_distributed.py``. Those of DeepSpeed need
it installed: ``pip install 'voco_plugin[deepspeed]'``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import load_from_disk

import voco_plugin as vp
from distributed_worker import PROBE
from launched import ENGINES, KIND, WORKER, Place, environment
from voco_plugin.cli.accelerate_launch import integration_folder

TOLERANCE = 1e-4


# -- real processes
# ---------------------------------------------------------------------------------------------------------


def losses(process: dict) -> list[float]:
    return [entry["loss"] for entry in process["log"]]


def answers_of(place: Place, folder: str) -> torch.Tensor:
    """The logits of a saved model, loaded in this process, on the rows the worker looked at."""
    model, processor = vp.load(folder)
    collator = vp.VoCoDataCollator(processor=processor, voco=vp.attachment(model).config)
    rows = load_from_disk(place.data())
    with torch.no_grad():
        return model(**collator([rows[i] for i in PROBE])).logits


def one(place: Place, name: str, lora: bool) -> dict:
    """The run of one process that holds the whole batch of four."""
    args = {"per_device_train_batch_size": 4}
    return place.run(f"{name}-{lora}-one", 1, model=place.base(name), lora=lora, args=args)[0]


def two(place: Place, name: str, lora: bool, engine: str, **spec: Any) -> list[dict]:
    """The run of two processes with batches of two, and a checkpoint at steps 2 and 4."""
    args = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    if engine != "ddp":
        args["deepspeed"] = str(integration_folder() / "deepspeed" / f"{engine}.json")
    label = f"{name}-{lora}-{engine}" + ("-resumed" if "resume" in spec else "")
    return place.run(label, 2, model=place.base(name), lora=lora, args=args, **spec)


CASES = [
    pytest.param("llava_llama", False, id="full"),
    pytest.param("llava_llama", True, id="lora"),
    pytest.param("llava_tied", True, id="lora-tied"),
]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "lora"), CASES)
def test_two_processes_have_the_losses_of_one(place: Place, name: str, lora: bool, engine: str) -> None:
    alone, processes = one(place, name, lora), two(place, name, lora, engine)
    assert [(p["world"], p["kind"], p["engine"]) for p in processes] == [(2, *KIND[engine])] * 2
    assert all(p["attached"] for p in processes)
    assert len(losses(alone)) == 4 and losses(alone)[0] - losses(alone)[-1] > 0.1, "nothing was learned"
    assert losses(processes[0]) == pytest.approx(losses(alone), abs=TOLERANCE)
    for entry, expected in zip(processes[0]["log"], alone["log"], strict=True):
        for key in ("compression_ratio", "voco_tokens_per_sample", "isolation", "num_tokens"):
            assert entry[key] == pytest.approx(expected[key]), key
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert processes[0]["report"] == alone["report"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "lora"), CASES)
def test_their_checkpoints_load_in_one_process_with_the_same_logits(
    place: Place, name: str, lora: bool, engine: str
) -> None:
    out = two(place, name, lora, engine)[0]["out"]
    trained = [torch.load(f"{out}.{rank}.pt") for rank in (0, 1)]
    assert torch.equal(trained[0], trained[1])
    for folder in (f"{out}.saved", f"{out}.run/checkpoint-4"):
        assert float((answers_of(place, folder) - trained[0]).abs().max()) <= 1e-5
    saved = sorted(path.name for path in Path(f"{out}.saved").iterdir())
    assert saved.count("voco_config.json") == 1 and not [name for name in saved if name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "lora"), CASES)
def test_a_resumed_run_of_two_processes_has_the_losses_of_an_uninterrupted_one(
    place: Place, name: str, lora: bool, engine: str
) -> None:
    whole = two(place, name, lora, engine)
    resumed = two(place, name, lora, engine, resume=f"{whole[0]['out']}.run/checkpoint-2")
    assert losses(resumed[0])[2:] == losses(whole[0])[2:] and len(losses(resumed[0])) == 4
    ends = [torch.load(f"{process[0]['out']}.0.pt") for process in (whole, resumed)]
    assert torch.equal(*ends)


@pytest.mark.slow
def test_fsdp2_with_lora_has_the_losses_of_one_process_and_loads(place: Place) -> None:
    """accelerate refuses FSDP on a CPU by its device type alone: the worker tells it that these are GPUs."""
    alone = one(place, "llava_llama", True)
    args = {"per_device_train_batch_size": 2}
    sharded = place.run("fsdp2", 2, model=place.base("llava_llama"), lora=True, args=args, fsdp=True)
    assert [p["kind"] for p in sharded] == ["FSDP"] * 2 and sharded[0]["engine"].startswith("FSDP")
    assert losses(sharded[0]) == pytest.approx(losses(alone), abs=TOLERANCE)
    trained = torch.load(f"{sharded[0]['out']}.0.pt")
    assert float((answers_of(place, f"{sharded[0]['out']}.saved") - trained).abs().max()) <= 1e-5


@pytest.mark.slow
def test_elastic_k_is_drawn_by_batch_whatever_the_processes(place: Place) -> None:
    """Two processes may draw different K in one step; one process that accumulates draws the same two."""
    common = {
        "per_device_train_batch_size": 2,
        "num_tokens_range": [1, 4],
        "train_sampling_strategy": "sequential",
    }
    model = place.base("llava_llama")
    alone = place.run("elastic-one", 1, model=model, args={**common, "gradient_accumulation_steps": 2})[0]
    both = place.run("elastic-two", 2, model=model, args=common)[0]
    assert losses(both) == pytest.approx(losses(alone), abs=TOLERANCE)
    drawn = {entry["voco_tokens_per_sample"] for entry in both["log"]}
    assert len(drawn) > 1, "the range makes no difference"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_command_line_launches_its_own_profiles(place: Place, engine: str, tmp_path: Path) -> None:
    recipe = {
        "model_name_or_path": place.base("llava_llama"), "dataset_name": place.data(), "use_cpu": True,
        "voco": {"num_tokens": 2}, "output_dir": str(tmp_path / "run"), "max_steps": 1, "disable_tqdm": True,
        "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "voco_plugin", "train", "r.yaml", "--num_processes", "2", "--json"]
    done = subprocess.run(
        [*command, "--accelerate_config", engine],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    results = [line for line in done.stdout.splitlines() if "output_dir" in line]
    assert len(results) == 1, f"not one result: {done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["log_history"][0]["num_tokens"] > 0
    assert vp.is_attached(vp.load(tmp_path / "run")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "why"),
    [
        (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            "each would train the whole",
        ),
        (["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"], "and started one"),
    ],
)
def test_processes_that_would_train_alone_say_so(place: Place, how: list[str], why: str) -> None:
    """torchrun without ``use_cpu`` on a machine without GPUs, and ``accelerate launch --cpu``."""
    spec = place.folder / "alone.spec.json"
    args = {"use_cpu": "accelerate.commands.launch" in how}
    spec.write_text(
        json.dumps(
            {"model": place.base("llava_llama"), "data": place.data(), "out": str(spec) + ".x", "args": args}
        )
    )
    done = subprocess.run(
        [sys.executable, *how, str(WORKER), str(spec)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode != 0 and why in done.stderr, done.stderr[-3000:]
