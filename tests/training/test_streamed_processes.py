"""Two processes whose batches hold other numbers of frames take in two stages the steps of one in one pass.

Real processes (gloo, CPU), slow: ``pytest -m slow tests/training/test_streamed_processes.py``.
"""

# ruff: noqa: F811  (the fixtures of other test files)

from __future__ import annotations

import pytest
from datasets import Dataset, Image, List

from launched import KIND, needs_deepspeed
from trainers import picture
from voco_plugin.cli.accelerate_launch import integration_folder

FRAMES = (1, 5, 2, 3, 4, 1, 2, 6, 1, 1, 3, 2)


def films(place) -> str:
    path = place.folder / "films"
    if not path.is_dir():
        image, ask = {"type": "image", "text": None}, {"type": "text", "text": "what is it"}
        answers = ["red", "blue circle", "green square"]
        messages = [
            [
                {"role": "user", "content": [*[image] * n, ask]},
                {"role": "assistant", "content": [{"type": "text", "text": answers[i % 3]}]},
            ]
            for i, n in enumerate(FRAMES)
        ]
        images = [[picture(10 * i + j) for j in range(n)] for i, n in enumerate(FRAMES)]
        rows = Dataset.from_dict({"messages": messages, "images": images})
        rows.cast_column("images", List(Image())).save_to_disk(str(path))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
@pytest.mark.parametrize("lora", [True, False])
def test_two_processes_in_two_stages_have_the_losses_of_one_in_one_pass(place, lora, engine):
    more = {"assistant_only_loss": True}
    alone = place.run(
        f"joint-{lora}", 1, model=place.base("llava_llama"), data=films(place), lora=lora,
        args={**more, "per_device_train_batch_size": 4},
    )[0]  # fmt: skip
    if engine != "ddp":
        more["deepspeed"] = str(integration_folder() / "deepspeed" / f"{engine}.json")
    both = place.run(
        f"streamed-{lora}-{engine}", 2, model=place.base("llava_llama"), data=films(place), lora=lora,
        args={**more, "per_device_train_batch_size": 2, "stage1": "streamed", "stage1_chunk": 2},
    )  # fmt: skip
    assert [(p["world"], p["kind"], p["engine"]) for p in both] == [(2, *KIND[engine])] * 2
    assert len(alone["log"]) == 4 and alone["log"][0]["loss"] - alone["log"][-1]["loss"] > 0.1
    for process in both:
        for entry, expected in zip(process["log"], alone["log"], strict=True):
            for key in ("loss", "grad_norm", "compression_ratio", "voco_tokens_per_sample"):
                assert entry[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-5), key


@pytest.mark.slow
def test_two_processes_on_one_store_have_the_losses_of_one_that_computes(place, tmp_path):
    more = {"assistant_only_loss": True, "stage1": "frozen", "train_voco": False}
    given = {"model": place.base("llava_llama"), "data": films(place), "lora": True}
    alone = place.run("frozen", 1, args={**more, "per_device_train_batch_size": 4}, **given)[0]
    more |= {"per_device_train_batch_size": 2, "stage1_store": str(tmp_path / "store")}
    for name in ("frozen-filling", "frozen-reading"):
        for process in place.run(name, 2, args=more, **given):
            assert (process["world"], process["engine"]) == (2, KIND["ddp"][1])
            for entry, expected in zip(process["log"], alone["log"], strict=True):
                for key in ("loss", "grad_norm", "voco_tokens_per_sample"):
                    assert entry[key] == pytest.approx(expected[key], rel=2e-4, abs=1e-5), key
