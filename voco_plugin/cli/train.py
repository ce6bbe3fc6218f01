"""``voco train RECIPE [--key value …]``: TRL's fine-tuning with VoCo tokens, from a YAML recipe."""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from . import output
from .recipe import Recipe, RecipeArguments, RecipeError, load

OWN_FLAGS = ("--debug", "--check", "--json")


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "train",
        parents=[common],
        help="train from a recipe",
        usage="voco train RECIPE [--key value …] [--check] [--json] [--debug]",
        description="Train from a recipe: a YAML file, or the bare name of a shipped one (`voco recipes`).\n"
        "Every key can be overridden: --learning_rate 1e-4 --voco.num_tokens 4 --lora_target_modules "
        "q_proj v_proj",
        epilog="examples:\n"
        "  voco train gridworld_voco --max_steps 100\n"
        "  voco train my.yaml --accelerate_config zero3 --num_processes 8\n",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a path, or the name of a shipped recipe")
    parser.add_argument(
        "--check", action="store_true", help="check the recipe and print its keys; train nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="override a key")


def run(args: argparse.Namespace) -> int:
    overrides = list(args.overrides)
    if "-h" in overrides or "--help" in overrides:
        args.parser.print_help()
        return 0
    for flag in OWN_FLAGS:
        if flag in overrides:
            overrides.remove(flag)
            setattr(args, flag[2:], True)
    recipe = load(args.recipe, overrides)
    config = recipe.arguments(RecipeArguments)
    if args.check:
        _print_check(recipe, args.json)
        return 0
    if config.accelerate_config is not None:
        return launch(recipe, config, overrides)
    with (
        contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    ):  # the trainer prints its log
        result = train(recipe)
    if args.json:
        output.emit_json(result)
    else:
        output.emit(f"saved {result['output_dir']} after {result['steps']} steps, {result['seconds']:.0f} s")
    return 0


def _print_check(recipe: Recipe, as_json: bool) -> None:
    if as_json:
        output.emit_json({"recipe": str(recipe.path), "values": recipe.values})
        return
    for key, value in recipe.values.items():
        output.emit(f"{key}: {value}")


def train(recipe: Recipe) -> dict[str, Any]:
    """Train as ``recipe`` says and save; returns where, the steps, the seconds and the last metrics.

    Raises:
        RecipeError: the recipe names no model or no data set.
        ValueError: the data or the model do not suit it.
    """
    arguments = recipe.arguments(RecipeArguments)
    for key in ("model_name_or_path", "dataset_name"):
        if not recipe.values.get(key):
            raise RecipeError(f"{recipe.path.name} has no {key}: add it, or give --{key} VALUE.")
    for key, value in (arguments.env or {}).items():
        os.environ[key] = str(value)

    from trl import ModelConfig, get_peft_config, get_quantization_config

    from ..data.loaders import load_vision_dataset
    from ..training.config import VoCoSFTConfig
    from ..training.trainer import VoCoSFTTrainer

    model_config = recipe.arguments(ModelConfig)
    config = recipe.arguments(VoCoSFTConfig)
    source, revision = model_config.model_name_or_path, model_config.model_revision
    check_model_path(source)

    dataset = load_vision_dataset(
        arguments.dataset_name,
        arguments.dataset_train_split,
        arguments.image_folder,
        missing_images=config.on_bad_sample == "skip",
    )
    if arguments.max_train_samples is not None:
        dataset = dataset.select(range(min(arguments.max_train_samples, len(dataset))))
    evaluation = None
    if str(getattr(config.eval_strategy, "value", config.eval_strategy)) != "no":
        evaluation = load_vision_dataset(
            arguments.eval_dataset_name or arguments.dataset_name,
            arguments.dataset_test_split or (None if arguments.eval_dataset_name else "test"),
            arguments.eval_image_folder or arguments.image_folder,
            missing_images=config.on_bad_sample == "skip",
        )
    config.model_init_kwargs = {
        "revision": revision,
        "dtype": model_config.dtype,
        **(
            {"attn_implementation": model_config.attn_implementation}
            if model_config.attn_implementation
            else {}
        ),
        **(config.model_init_kwargs or {}),
    }
    trainer = VoCoSFTTrainer(
        model=source,
        args=config,
        train_dataset=dataset,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
    )
    resume = config.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume) if resume is not None else None
    outcome = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(config.output_dir)
    trainer.save_state()  # trainer_state.json: the loss curve
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    return {
        "output_dir": config.output_dir,
        "steps": outcome.global_step,
        "seconds": outcome.metrics.get("train_runtime", 0.0),
        "metrics": outcome.metrics,
    }


def check_model_path(source: str) -> None:
    """Refuse a path that looks local and is not there, before transformers takes it for a hub id."""
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(os.sep)
    if looks_local and not Path(source).expanduser().is_dir():
        raise FileNotFoundError(
            f"model {source} does not exist: give a folder that holds a config.json (or "
            f"adapter_config.json), or a hub id."
        )


# -- several processes
# -------------------------------------------------------------------------------------------------


def profiles() -> dict[str, Path]:
    """The accelerate profiles that TRL ships, by name."""
    folder = importlib.resources.files("trl.accelerate_configs")
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if f.name.endswith(".yaml")}


def launch_arguments(recipe: Recipe, config: RecipeArguments, overrides: list[str]) -> list[str]:
    """The arguments of ``accelerate launch`` that run this recipe in every process."""
    from ..config import nearest

    name = str(config.accelerate_config)
    path = Path(name).expanduser()
    if not path.is_file():
        known = profiles()
        if name not in known:
            raise RecipeError(
                f"accelerate_config={name!r} is neither a file nor a profile{nearest(name, known)}; "
                f"profiles: {', '.join(sorted(known))}."
            )
        path = known[name]
    text = path.read_text(encoding="utf-8")
    if "DEEPSPEED" in text and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            f"accelerate_config={name!r} needs DeepSpeed: pip install 'voco_plugin[deepspeed]'."
        )
    processes = [] if config.num_processes is None else ["--num_processes", str(config.num_processes)]
    # the child must not launch again: the last --accelerate_config wins
    child = ["train", str(recipe.path), *overrides, "--accelerate_config", "null"]
    return ["--config_file", str(path), *processes, "--module", "voco_plugin", *child]


def launch(recipe: Recipe, config: RecipeArguments, overrides: list[str]) -> int:
    """Run this command again under ``accelerate launch``."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = launch_arguments(recipe, config, overrides)
    output.note(f"accelerate launch {' '.join(arguments)}")
    sys.stdout.flush()
    launch_command(launch_command_parser().parse_args(arguments))
    return 0
