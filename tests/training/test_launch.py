"""A launch that would train another way than asked stops with the fix; what upstream lacks is put back after
use.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import tiny
import voco_plugin as vp
from paths import ROOT
from voco_plugin import _compat
from voco_plugin.cli.accelerate_launch import check_profile, integration_folder, profiles
from voco_plugin.cli.recipe import RecipeError
from voco_plugin.training.launch import LaunchError, check_launch, check_sharded_head


def arguments(world: int = 1, kind: str = "NO", **more: Any) -> SimpleNamespace:
    state = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    return SimpleNamespace(**{"world_size": world, "use_cpu": True, "distributed_state": state, **more})


def zero3(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3, **more}})


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}


@pytest.mark.parametrize(
    ("args", "environment", "why"),
    [
        (arguments(), {"WORLD_SIZE": "2", "RANK": "0"}, "2 processes were launched and the trainer sees 1"),
        (arguments(use_cpu=False), {"WORLD_SIZE": "2"}, "--use_cpu true"),
        (arguments(), {"OMPI_COMM_WORLD_SIZE": "4"}, "4 processes were launched"),
        (arguments(), ACCELERATE, "asked for several processes and started one"),
        (arguments(2, "MULTI_CPU"), {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP needs GPUs"),
        (arguments(fsdp="full_shard"), {}, "FSDP needs GPUs"),
        (arguments(deepspeed_plugin=zero3()), {}, "stage3_gather_16bit_weights_on_model_save"),
    ],
)
def test_a_launch_that_trains_another_way_than_asked_is_refused(args, environment, why: str) -> None:
    with pytest.raises(LaunchError, match=why):
        check_launch(args, environment)


@pytest.mark.parametrize(
    ("args", "environment"),
    [
        (arguments(), {}),
        (arguments(fsdp=[]), {"MASTER_ADDR": "10.0.0.1"}),
        (arguments(2, "MULTI_CPU"), {**ACCELERATE, "WORLD_SIZE": "2"}),
        (arguments(2, "MULTI_GPU"), {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}),
        (arguments(deepspeed_plugin=zero3(stage3_gather_16bit_weights_on_model_save=True)), {}),
    ],
)
def test_a_launch_that_does_what_was_asked_is_not(args, environment) -> None:
    check_launch(args, environment)


def test_the_trainer_checks_its_launch(monkeypatch, tmp_path) -> None:
    config = vp.VoCoSFTConfig(str(tmp_path), voco=vp.VoCoConfig(), use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="2 processes were launched"):
        vp.VoCoSFTTrainer("no/such-model", args=config)


@pytest.mark.parametrize(
    ("settings", "processes", "use_cpu", "devices", "why"),
    [
        ({"distributed_type": "NO"}, 2, True, 0, "starts one process, not 2.*ddp --use_cpu true"),
        ({"distributed_type": "MULTI_CPU"}, 2, True, 0, "starts one process"),
        ({"distributed_type": "FSDP"}, 2, True, 8, "trains with DDP instead"),
        ({"distributed_type": "FSDP"}, 2, False, 0, "trains with DDP instead"),
        ({"distributed_type": "MULTI_GPU"}, 2, False, 0, "no GPU.*--use_cpu true"),
        ({"distributed_type": "DEEPSPEED"}, None, True, 8, "how many processes share the CPU"),
        ({"distributed_type": "MULTI_GPU"}, 8, False, 2, "8 processes for 2 GPUs.*--num_processes 2"),
    ],
)
def test_a_profile_that_would_not_start_what_is_asked_is_refused(
    settings, processes, use_cpu, devices, why
) -> None:
    with pytest.raises(RecipeError, match=why):
        check_profile("p", settings, processes, use_cpu, devices)


def test_a_profile_takes_every_device_and_never_launches_within_a_launch(monkeypatch) -> None:
    ddp = {"distributed_type": "MULTI_GPU"}
    assert check_profile("ddp", ddp, None, False, 4) == 4
    assert check_profile("ddp", ddp, 2, True, 0) == 2
    assert check_profile("ddp", {**ddp, "num_machines": 2}, 16, False, 8) == 16
    assert check_profile("p", {"distributed_type": "NO"}, None, True, 0) == 1
    assert check_profile("p", {"distributed_type": "MULTI_CPU", "mpirun_config": {"a": 1}}, 2, True, 0) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="--accelerate_config null"):
        check_profile("ddp", ddp, 2, True, 0)


def test_num_processes_without_a_launch_is_an_error_of_one_line(capsys, monkeypatch, tmp_path) -> None:
    from voco_plugin.cli import main

    monkeypatch.chdir(tmp_path)
    given = ["--model_name_or_path", "a/b", "--dataset_name", "c/d"]
    assert main(["train", "gridworld_voco", "--num_processes", "2", *given]) == 2
    assert "num_processes=2, and this is one process" in capsys.readouterr().err


def test_every_own_profile_is_one_that_accelerate_reads_and_names_a_file_that_is_there() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    own = sorted((integration_folder() / "accelerate").glob("*.yaml"))
    assert [path.stem for path in own] == ["ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]
    for path in own:
        assert profiles()[path.stem] == path
        load_config_from_file(str(path))
        settings = yaml.safe_load(path.read_text())
        if settings["distributed_type"] != "DEEPSPEED":
            continue
        file = settings["deepspeed_config"]["deepspeed_config_file"]
        zero = json.loads((ROOT / file).read_text())["zero_optimization"]
        assert f"zero{zero['stage']}" == path.stem.split("_")[0]
        assert ("offload_param" in zero) == path.stem.endswith("offload")
        saves = zero.get("stage3_gather_16bit_weights_on_model_save", False)
        assert saves == (zero["stage"] == 3), "checkpoints would hold no weights"


def test_what_compat_changes_in_upstream_it_puts_back(monkeypatch) -> None:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    stock = vars(TrainableTokensLayer)["_collect_token_weights"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KeyError), _compat.token_rows_on_any_device():
        assert vars(TrainableTokensLayer)["_collect_token_weights"] is not stock
        raise KeyError
    assert vars(TrainableTokensLayer)["_collect_token_weights"] is stock


class Head(torch.nn.Linear):
    """A model that is its own LM head."""

    def get_output_embeddings(self) -> torch.nn.Module:
        return self


def test_fsdp2_with_a_trainable_head_is_refused() -> None:
    head = Head(2, 2)
    with pytest.raises(LaunchError, match="FSDP2 with a trainable LM head"):
        check_sharded_head(head, 2)
    check_sharded_head(head, 1)
    check_sharded_head(head, None)
    check_sharded_head(head.requires_grad_(False), 2)


def test_layers_named_for_wrapping_are_those_the_model_has() -> None:
    model = tiny.build("llava_llama")
    stock = set(type(model)._no_split_modules or ()), set(model._no_split_modules)
    assert "CLIPTextEmbeddings" in model._no_split_modules, "upstream's list is right now: drop the mending"
    _compat.name_present_layers(model)
    assert stock[1] - set(model._no_split_modules) == {"CLIPTextEmbeddings"}
    assert {"CLIPEncoderLayer", "LlamaDecoderLayer"} <= set(model._no_split_modules)
    assert set(type(model)._no_split_modules or ()) == stock[0], "the class was changed"
