"""Many processes are taught as one: the same losses and divergences under DDP and ZeRO, with every teacher.

Real processes (gloo, CPU), slow: ``pytest -m slow tests/training/test_distilling_processes.py``.
"""

# ruff: noqa: F811  (the fixtures of other test files)

from __future__ import annotations

import pytest

from launched import ENGINES, KIND
from voco_plugin.cli.accelerate_launch import integration_folder

TERMS = ("loss", "ce_loss", "distill_loss", "hidden_loss", "grad_norm")
COMMON = {"weight": 0.5, "hidden_weight": 0.2, "top_k": 50}
CASES = [
    pytest.param("llava_llama", True, "base", id="lora-base"),
    pytest.param("llava_tied", True, "base", id="lora-tied-base"),
    pytest.param("llava_llama", False, "frozen", id="full-frozen"),
    pytest.param("llava_llama", False, "checkpoint", id="full-checkpoint"),
]


def run(place, name, lora, teacher, processes, **args):
    distill = {**COMMON, "teacher": place.base(name) if teacher == "checkpoint" else teacher}
    label = f"{name}-{lora}-{teacher}-{processes}-" + "-".join(
        str(v).rsplit("/", 1)[-1].split(".")[0] for v in args.values()
    )
    options = {"distill": distill, "assistant_only_loss": True, **args}
    return place.run(label, processes, model=place.base(name), lora=lora, args=options)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "lora", "teacher"), CASES)
def test_two_processes_have_the_terms_of_one(place, name, lora, teacher, engine):
    more = {}
    if engine != "ddp":
        more["deepspeed"] = str(integration_folder() / "deepspeed" / f"{engine}.json")
    if engine == "zero3" and teacher == "frozen":
        pytest.skip("refused: the copy would be of split weights (test_distilling.py)")
    alone = run(place, name, lora, teacher, 1, per_device_train_batch_size=4)[0]
    both = run(place, name, lora, teacher, 2, per_device_train_batch_size=2, **more)
    assert [(p["world"], p["kind"], p["engine"]) for p in both] == [(2, *KIND[engine])] * 2
    first, last = alone["log"][0], alone["log"][-1]
    assert len(alone["log"]) == 4 and first["distill_loss"] > 0.05
    assert first["loss"] - last["loss"] > 0.1, "nothing was learned"
    for process in both:
        for entry, expected in zip(process["log"], alone["log"], strict=True):
            for key in TERMS:
                assert entry[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-5), key


@pytest.mark.slow
def test_accumulation_under_ddp_is_one_batch_too(place):
    alone = run(place, "llava_llama", False, "frozen", 1, per_device_train_batch_size=4)[0]
    both = run(
        place, "llava_llama", False, "frozen", 2,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, ddp_find_unused_parameters=True,
    )  # fmt: skip
    for entry, expected in zip(both[0]["log"], alone["log"], strict=True):
        for key in TERMS:
            assert entry[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-5), key


@pytest.mark.slow
def test_fsdp2_with_lora_has_the_terms_of_one_process(place):
    """accelerate is told that these processes have GPUs, as in test_distributed."""
    alone = run(place, "llava_llama", True, "base", 1, per_device_train_batch_size=4)[0]
    options = {"distill": {**COMMON, "teacher": "base"}, "assistant_only_loss": True}
    sharded = place.run(
        "fsdp2-base", 2, model=place.base("llava_llama"), lora=True, fsdp=True,
        args={**options, "per_device_train_batch_size": 2},
    )  # fmt: skip
    assert [p["kind"] for p in sharded] == ["FSDP"] * 2
    for entry, expected in zip(sharded[0]["log"], alone["log"], strict=True):
        for key in TERMS[:-1]:
            assert entry[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-5), key
