"""``voco study --print-commands``: what a study would run, one line each, for a cluster's scheduler."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from . import output
from .accelerate_launch import profile_arguments
from .recipe import RecipeArguments, load


def print_commands(planner: Any, args: argparse.Namespace) -> int:
    """Per training one line, and one for each reading of it; what is finished is left out."""
    from ..evaluation.study.plan import units
    from ..evaluation.study.records import command, trained, was_read
    from ..evaluation.study.runner import choose, matches

    for source in dict.fromkeys((planner.model, planner.data)):
        if source and "/" in str(source) and not Path(source).expanduser().exists():
            output.note(f"{source} is not here: folders are named by its content, and get others where it is")
    candidates = planner.candidates()
    chosen, _ = choose(candidates)
    waiting = {run.method.name for run in candidates} - set(chosen)
    ready = [run for run in planner.runs(chosen) if planner.tuned_as(run.method) not in waiting]
    runs = [run for run in [*candidates, *ready] if matches(run.name, args.only)]
    for training, readings in units(runs):
        names = [run.name for run in runs if any(r in readings for r in run.readings)]
        output.emit(f"# {', '.join(dict.fromkeys(names))}")
        if training is not None and not trained(training):
            output.emit(train_line(list(training.words)))
        for reading in readings:
            if not was_read(reading):
                output.emit(command(reading.words))
    if waiting:
        late = ", ".join(sorted(waiting))
        output.emit(f"# the runs of {late} come after the search: run this again when it is done")
    return 0


def train_line(words: list[str]) -> str:
    """``voco train …``, or where the recipe names a profile the ``accelerate launch`` that it would start."""
    recipe = load(words[1], words[2:])
    config = recipe.arguments(RecipeArguments)
    if config.accelerate_config is None:
        return shlex.join(["voco", *words])
    child = [*words, "--accelerate_config", "null"]
    return shlex.join(["accelerate", "launch", *profile_arguments(config), "--module", "voco_plugin", *child])
