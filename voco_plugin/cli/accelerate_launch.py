"""``voco train … --accelerate_config NAME``: the same command again in many processes, through accelerate."""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ..config import nearest
from . import output
from .recipe import Recipe, RecipeArguments, RecipeError

ONE_PROCESS = ("NO", "MULTI_CPU")
"""accelerate's distributed types for which ``accelerate launch`` starts one process (1.15)."""


def integration_folder() -> Path:
    """Where ``integrations`` is: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "integrations"
    return inside if inside.is_dir() else package.parent / "integrations"


def load_integration(name: str) -> Any:
    """The package ``integrations/NAME``: as it is installed, or from the top of the checkout."""
    top, full = "voco_plugin.integrations", f"voco_plugin.integrations.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as problem:
        if (
            not problem.name
            or not problem.name.startswith(top)
            or not f"{full}.".startswith(f"{problem.name}.")
        ):
            raise
    folder = str(integration_folder())
    spec = importlib.util.spec_from_file_location(
        top, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[top] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[top])
    return importlib.import_module(full)


def profiles() -> dict[str, Path]:
    """Name → file of every accelerate profile: TRL's, and this package's, which win where names are equal."""
    folder = importlib.resources.files("trl.accelerate_configs")
    found = {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if f.name.endswith(".yaml")}
    own = sorted((integration_folder() / "accelerate").glob("*.yaml"))
    return found | {path.stem: path for path in own}


def find_profile(name: str) -> Path:
    """The accelerate config given as a path or by its name.

    Raises:
        RecipeError: there is none; the nearest name is given.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = profiles()
    if name not in known:
        raise RecipeError(
            f"accelerate_config={name!r} is neither a file nor a profile{nearest(name, known)}; "
            f"profiles: {', '.join(sorted(known))}."
        )
    return known[name]


def devices() -> int:
    """The number of accelerators of this machine; 0 where it has only a CPU."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def launch_arguments(recipe: Recipe, config: RecipeArguments, overrides: list[str]) -> list[str]:
    """The arguments of ``accelerate launch`` that run this recipe in every process.

    Raises:
        RecipeError: there is no such profile, or it would not start the processes it is asked for.
        ImportError: DeepSpeed is asked for and not installed.
    """
    name = str(config.accelerate_config)
    path = find_profile(name)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise RecipeError(f"accelerate_config={name!r} ({path}) has no distributed_type: it is no profile.")
    if settings["distributed_type"] == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            f"accelerate_config={name!r} needs DeepSpeed: pip install 'voco_plugin[deepspeed]'."
        )
    processes = config.num_processes or settings.get("num_processes")
    processes = check_profile(name, settings, processes, bool(recipe.values.get("use_cpu")), devices())
    more = ["--num_processes", str(processes)]
    more += _own_deepspeed_file(path, settings)
    # the child must not launch again: the last --accelerate_config wins
    child = ["train", str(recipe.path), *overrides, "--accelerate_config", "null"]
    return ["--config_file", str(path), *more, "--module", "voco_plugin", *child]


def _own_deepspeed_file(path: Path, settings: dict[str, Any]) -> list[str]:
    """This package's profiles name their DeepSpeed file from the top of a checkout: where it really is."""
    file = (settings.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if file is None or path.parent != integration_folder() / "accelerate":
        return []
    return ["--deepspeed_config_file", str(integration_folder() / "deepspeed" / Path(file).name)]


def profile_arguments(config: RecipeArguments) -> list[str]:
    """The options of ``accelerate launch`` for a recipe's profile, to be run on another machine: nothing of
    this one is checked.

    Raises:
        RecipeError: there is no such profile.
    """
    path = find_profile(str(config.accelerate_config))
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    processes = config.num_processes or settings.get("num_processes")
    more = [] if processes is None else ["--num_processes", str(processes)]
    return ["--config_file", str(path), *more, *_own_deepspeed_file(path, settings)]


def check_profile(
    name: str, settings: dict[str, Any], processes: int | None, use_cpu: bool, devices: int
) -> int:
    """How many processes to start, or why the profile cannot start them.

    Args:
        name: of the profile, for messages.
        settings: its content.
        processes: as asked for by the recipe or the profile; ``None`` takes every device.
        use_cpu: whether the recipe trains on the CPU.
        devices: how many accelerators this machine has.

    Raises:
        RecipeError: the launch would run fewer processes than asked for, or train another way.
    """
    from ..training.launch import launched_processes

    kind = str(settings["distributed_type"])
    here = f"accelerate_config={name!r}"
    cpu = use_cpu or devices == 0
    one_machine = int(settings.get("num_machines") or 1) == 1
    if launched_processes(os.environ) is not None:
        raise RecipeError(
            f"{here} would launch again in each process of the launcher that started this one: add "
            "--accelerate_config null, or start `voco train` by itself."
        )
    if kind in ONE_PROCESS:
        mpi = kind == "MULTI_CPU" and settings.get("mpirun_config")
        if (processes or 1) > 1 and not mpi:
            raise RecipeError(
                f"{here} is of distributed_type {kind}, with which accelerate starts one process, not "
                f"{processes}: use --accelerate_config ddp{' --use_cpu true' if cpu else ''}."
            )
        return processes or 1
    if kind == "FSDP" and cpu:
        raise RecipeError(
            f"{here} is FSDP, and on a CPU accelerate trains with DDP instead, the whole model in each "
            "process: use --accelerate_config zero3 (DeepSpeed) or ddp."
        )
    if devices == 0 and not use_cpu:
        raise RecipeError(
            f"{here}: this machine has no GPU, and each process would train alone on the CPU; add "
            "--use_cpu true to train on the CPU together."
        )
    processes = processes or (None if cpu else devices)
    if processes is None:
        raise RecipeError(f"{here}: say how many processes share the CPU: --num_processes 2.")
    if not cpu and one_machine and processes > devices:
        raise RecipeError(
            f"{here}: {processes} processes for {devices} GPUs; give --num_processes {devices} or fewer."
        )
    return processes


def launch(recipe: Recipe, config: RecipeArguments, overrides: list[str]) -> int:
    """Run this command again under ``accelerate launch``; returns its exit status."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_arguments(recipe, config, overrides)
    output.note(f"accelerate launch {' '.join(arguments)}")
    sys.stdout.flush()
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as failure:  # a process has said why already
        codes = [found.exitcode for found in failure.failures.values()]
        return 2 if 2 in codes else next((code for code in codes if code > 0), 1)
    except subprocess.CalledProcessError as failure:
        return failure.returncode if failure.returncode > 0 else 1
    return 0
