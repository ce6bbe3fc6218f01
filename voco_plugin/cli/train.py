"""``voco train RECIPE [--key value …]``: TRL's fine-tuning with VoCo tokens, from a YAML recipe."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.model_paths import check_model_path
from . import output, recipe_values
from .accelerate_launch import launch
from .preconditions import check_inputs, commands_before
from .recipe import Recipe, RecipeArguments, load, named_inputs
from .recipe_values import RecipeError

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
        "  voco train gridworld_voco --voco.num_tokens 4 --num_tokens_range 1 4\n"
        "  voco train my.yaml --accelerate_config zero3 --num_processes 8\n",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a path, or the name of a shipped recipe")
    parser.add_argument(
        "--check", action="store_true", help="check the recipe and print its keys; train nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--plugin", action="append", metavar="FILE", help="a Python file that registers components"
    )
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="override a key")


def run(args: argparse.Namespace) -> int:
    from ..training.trl_floor import check_trl

    overrides = list(args.overrides)
    if "-h" in overrides or "--help" in overrides:
        args.parser.print_help()
        return 0
    for flag in OWN_FLAGS:
        if flag in overrides:
            overrides.remove(flag)
            setattr(args, flag[2:], True)
    check_trl()
    if args.plugin:
        overrides += ["--plugin", *args.plugin]
    if not args.check:
        check_files(args.recipe, overrides)
    recipe = load(args.recipe, overrides)
    config = recipe.arguments(RecipeArguments)
    if args.check:
        _print_check(recipe, args.json)
        return 0
    if config.accelerate_config is not None:
        flags = [flag for flag in OWN_FLAGS if getattr(args, flag[2:])]
        return launch(recipe, config, [*overrides, *flags])
    with (
        contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    ):  # the trainer prints its log
        result = train(recipe, [args.recipe, *overrides])
    if not result.pop("main_process"):
        return 0
    if args.json:
        output.emit_json(result)
    else:
        output.emit(f"saved {result['output_dir']} after {result['steps']} steps, {result['seconds']:.0f} s")
    return 0


def check_files(name: str, overrides: Sequence[str]) -> None:
    """Refuse a recipe whose model or data are local and not there, before torch is imported.

    Raises:
        FileNotFoundError: with the commands that the recipe names as coming before it.
    """
    path, names = named_inputs(name, overrides)
    _, own = named_inputs(name)
    for key, value in names.items():
        before = commands_before(path) if value == own[key] else ()
        if key == "model_name_or_path":
            check_inputs({key: value}, {}, before)
        else:
            check_inputs({}, {key: value}, before)


def _print_check(recipe: Recipe, as_json: bool) -> None:
    if as_json:
        output.emit_json({"recipe": str(recipe.path), "values": recipe.values})
        return
    for key, value in recipe.values.items():
        output.emit(f"{key}: {value}")


def train(recipe: Recipe, typed: list[str] | None = None) -> dict[str, Any]:
    """Train as ``recipe`` says and save; returns where, the steps, the seconds and the last metrics.

    Args:
        typed: the arguments of ``voco train``, for the model card.

    Raises:
        RecipeError: the recipe names no model or no data set.
        ValueError: the data or the model do not suit it.
    """
    arguments = recipe.arguments(RecipeArguments)
    if not recipe.values.get("model_name_or_path") and not arguments.model:
        raise RecipeError(
            f"{recipe.path.name} has no model_name_or_path: add it, or give --model_name_or_path VALUE (or a "
            "section model: {encoder:, llm:, projector:})."
        )
    if not recipe.values.get("dataset_name"):
        raise RecipeError(f"{recipe.path.name} has no dataset_name: add it, or give --dataset_name VALUE.")
    for key, value in (arguments.env or {}).items():
        os.environ[key] = str(value)

    from trl import ModelConfig, get_peft_config, get_quantization_config

    from ..data.loaders import load_vision_dataset
    from ..training.card import launch_command
    from ..training.checkpoints import NoteStart
    from ..training.config import VoCoSFTConfig
    from ..training.quantization import check_quantization
    from ..training.trainer import VoCoSFTTrainer

    model_config = recipe.arguments(ModelConfig)
    config = recipe.arguments(VoCoSFTConfig)
    _check_num_processes(arguments.num_processes, config.world_size)
    _check_unfinished(config, arguments.overwrite)
    source, revision = model_config.model_name_or_path, model_config.model_revision
    if source is not None:
        check_model_path(source)
    if arguments.model:
        if model_config.load_in_4bit or model_config.load_in_8bit:
            raise RecipeError(
                "a model section and quantization exclude each other: save the composed model first "
                "(vp.compose(…), save_pretrained), and name its folder as model_name_or_path."
            )
        if config.model_init_kwargs:
            raise RecipeError(
                f"model_init_kwargs ({', '.join(config.model_init_kwargs)}) are of a model that is loaded, "
                "and a model section makes one: dtype and attn_implementation are keys of the recipe itself."
            )
    # before anything loads: without bitsandbytes its config alone raises
    adapted = model_config.use_peft or (source and (Path(source) / "adapter_config.json").is_file())
    check_quantization(model_config, bool(adapted))

    dataset = _videos(arguments, arguments.dataset_name, config) or load_vision_dataset(
        arguments.dataset_name,
        arguments.dataset_train_split,
        image_folder_for(arguments.dataset_name, arguments.image_folder, typed),
        missing_images=config.on_bad_sample == "skip",
    )
    if arguments.max_train_samples is not None:
        dataset = dataset.select(range(min(arguments.max_train_samples, len(dataset))))
    evaluation = None
    if str(getattr(config.eval_strategy, "value", config.eval_strategy)) != "no":
        evaluation = _videos(arguments, arguments.eval_dataset_name, config) or load_vision_dataset(
            arguments.eval_dataset_name or arguments.dataset_name,
            arguments.dataset_test_split or (None if arguments.eval_dataset_name else "test"),
            arguments.eval_image_folder
            or image_folder_for(
                arguments.eval_dataset_name or arguments.dataset_name, arguments.image_folder, typed
            ),
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
    processor = None
    if arguments.model:
        source, processor = _compose(arguments.model, model_config, config)
        if isinstance(source, str):
            del config.model_init_kwargs["revision"]
        else:  # made as wanted
            config.model_init_kwargs = None
    trainer = VoCoSFTTrainer(
        model=source,
        args=config,
        processing_class=processor,
        train_dataset=dataset,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
    )
    trainer.dataset_name = arguments.dataset_name
    if typed is not None:
        trainer.command = launch_command(["voco", "train", *typed])
    resume = config.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume) if resume is not None else None
    trainer.add_callback(start := NoteStart())
    outcome = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(config.output_dir)
    trainer.save_state()  # trainer_state.json: the loss curve
    if trainer.is_world_process_zero():
        write_results(trainer, outcome, start.step)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    return {
        "output_dir": config.output_dir,
        "steps": outcome.global_step,
        "seconds": outcome.metrics.get("train_runtime", 0.0),
        "metrics": outcome.metrics,
        "main_process": trainer.is_world_process_zero(),
    }


def image_folder_for(data: str | None, folder: str | None, typed: Sequence[str] | None) -> str | None:
    """The recipe's ``image_folder``, where it says something of ``data``: a data set that was typed in the
    place of the recipe's LLaVA file, and holds its images itself, needs no warning that the folder is
    ignored. One that was typed too is passed on, and warned of.
    """
    asked = {key for key, _ in recipe_values.overrides(typed[1:])} if typed else set()
    other = bool(asked & {"dataset_name", "eval_dataset_name"}) and "image_folder" not in asked
    return None if other and Path(str(data)).suffix.lower() not in (".json", ".jsonl") else folder


def _check_unfinished(config: Any, overwrite: bool) -> None:
    """Refuse to train from step 0 over what an earlier run has made.

    Raises:
        RecipeError: ``output_dir`` holds a finished run, and neither ``overwrite`` nor a checkpoint to go on
            from was named.
    """
    done = Path(config.output_dir) / RESULTS_NAME
    goes_on = str(config.resume_from_checkpoint).lower() not in ("none", "false")
    if done.is_file() and not overwrite and not goes_on:
        raise RecipeError(
            f"{config.output_dir} holds a finished run ({RESULTS_NAME}), which would be trained over from "
            "step 0; give another --output_dir, go on with --resume_from_checkpoint true, or --overwrite "
            "true."
        )


def _videos(arguments: RecipeArguments, name: str | None, config: Any) -> Any:
    """The video set(s) that ``name`` names; ``None`` where the recipe reads no videos.

    Raises:
        RecipeError: the data are videos, and nothing says which frames are read.
    """
    from ..video.dataset_rows import is_video_set, load_video_dataset

    sampling: dict[str, Any] = {
        "count": arguments.video_frames, "fps": arguments.video_fps, "max_frames": arguments.video_max_frames,
    }  # fmt: skip
    if name is None:
        return None
    if arguments.video_frames is None and arguments.video_fps is None:
        if any(is_video_set(part.strip()) for part in name.split(",")):
            raise RecipeError(f"{name} names videos: say which frames are read, e.g. --video_frames 16.")
        return None
    return load_video_dataset(name, arguments.video_folder, on_bad_sample=config.on_bad_sample, **sampling)


RESULTS_NAME = "train_results.json"
"""Written last, when the model is saved: a folder that has it is a finished run."""


def write_results(trainer: Any, outcome: Any, resumed_at: int) -> None:
    """``train_results.json`` in the output folder: the last metrics, what trained, machine and versions.

    ``train_runtime`` counts the steps after ``resumed_at`` alone.
    """
    import json

    from ..benchmark.result_file import TRAINING_PACKAGES, environment
    from ..files import atomic_write_text

    trained, total = trainer.trained_and_all
    result = {
        **outcome.metrics,
        "steps": outcome.global_step,
        "resumed_at": resumed_at,
        "trained_parameters": trained,
        "parameters": total,
        "processes": trainer.args.world_size,
        "environment": environment(str(trainer.args.device), TRAINING_PACKAGES),
    }
    path = Path(trainer.args.output_dir) / RESULTS_NAME
    atomic_write_text(path, json.dumps(result, indent=2, default=str) + "\n")


def _check_num_processes(asked: int | None, found: int) -> None:
    """Refuse a run that is not as many processes as the recipe asks for."""
    if asked is not None and asked != found:
        what = "one process" if found == 1 else f"{found} processes"
        raise RecipeError(
            f"num_processes={asked}, and this is {what}: launch it with --accelerate_config ddp (or zero2, "
            "zero3, fsdp2), or leave num_processes out."
        )


def _compose(section: dict[str, Any], model_config: Any, config: Any) -> tuple[Any, Any]:
    """The model of a recipe's ``model`` section and its processor; for LoRA its folder, which the adapter
    names as its base."""
    from accelerate import PartialState

    from ..models import compose

    if not config.train_projector:
        output.note(
            "warning: the composed projector starts from random weights and train_projector is false: it "
            "stays as it is."
        )

    def build() -> tuple[Any, Any]:
        attention = model_config.attn_implementation
        return compose(**section, dtype=model_config.dtype, attn_implementation=attention)

    if not model_config.use_peft:
        return build()
    folder = Path(config.output_dir) / "composed"
    if PartialState().is_main_process:
        model, processor = build()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        output.note(f"composed {folder}: the base that the adapter is trained on")
    PartialState().wait_for_everyone()
    return str(folder.resolve()), None
