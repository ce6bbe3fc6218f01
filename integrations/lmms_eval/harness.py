"""One task of the harness, run in this process for ``voco eval SUITE``: its questions, its scores."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .arguments import ModelArgs
from .reading import Reader

TASKS = str(Path(__file__).resolve().parent / "tasks")
"""The tasks that this package ships: ``lmms_eval --include_path``."""


def check_installed() -> str:
    """The harness's version.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return version("lmms-eval")
    except ImportError:
        raise ImportError(
            "a suite runs in lmms-eval, which is not installed: pip install 'voco_plugin[eval]'."
        ) from None


@contextlib.contextmanager
def at_work(folder: str | Path) -> Iterator[None]:
    """Run in ``folder``, where the harness finds its data; what it prints goes to stderr."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.chdir(before)


def run_task(
    reader: Reader,
    task: str,
    metric: str,
    work: str | Path,
    *,
    limit: int | None = None,
    tick: Callable[[int], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The questions of a task with their answers and metrics (``samples``), and the harness's own figure of
    ``metric`` (``score``).

    Args:
        work: folder made by ``voco_plugin.evaluation.suite_data.prepare``.
        limit: the first so many questions.
        tick: called with the number of questions just answered.
        options: of :class:`~.arguments.ModelArgs` that are not of loading (frames, ``max_new_tokens``).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with at_work(work):
        from lmms_eval.evaluator import simple_evaluate
        from loguru import logger

        from .model import VoCoChat

        logger.remove()
        logger.add(sys.stderr, level="WARNING", format="lmms-eval: {message}")
        known = {key: value for key, value in options.items() if key in ModelArgs.__dataclass_fields__}
        lm = VoCoChat(reader=reader, **known)
        lm.tick = tick
        args = argparse.Namespace(
            output_path=str(Path(work) / "written"), process_with_media=False, reasoning_tags=None
        )
        try:
            found = simple_evaluate(
                model=lm, tasks=[task], limit=limit, log_samples=True, bootstrap_iters=0, cli_args=args,
                task_manager=_tasks(), verbosity="WARNING", process_docs_parallel=1,
            )  # fmt: skip
        except Exception as problem:
            reason = _of_the_data(problem)
            if reason is None:
                raise
            raise ValueError(
                f"{task}: lmms-eval cannot read its data: {reason}. Is it the data set that the task names, "
                "whole? (--debug shows where)"
            ) from problem
        samples = [_slim(sample) for sample in found["samples"][task]]
        if task.startswith("mmbench"):
            _mark_hits(samples, metric)
    for sample in samples:
        sample["images"] = list(lm.keys_of.get((task, sample["doc_id"]), ()))
    figures = found["results"][task]
    own = next((value for key, value in figures.items() if key.split(",")[0] == metric), None)
    own = float(own) if isinstance(own, (int, float)) or hasattr(own, "item") else None
    return {"task": task, "metric": metric, "score": own, "samples": samples}


def _of_the_data(problem: Exception) -> str | None:
    """What is wrong with data of another schema, in the words of what the harness raised; ``None`` where it
    is something else.
    """
    import datasets
    import tenacity

    if isinstance(problem, tenacity.RetryError):  # it tries everything five times
        problem = problem.last_attempt.exception() or problem
    kinds = (KeyError, AssertionError, AttributeError, datasets.exceptions.DatasetsError)
    return f"{type(problem).__name__}: {problem}" if isinstance(problem, kinds) else None


@functools.cache
def _tasks() -> Any:
    """The harness's tasks and ours; thousands of files are looked through for it."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", include_path=TASKS, model_name="voco")


def _slim(sample: dict[str, Any]) -> dict[str, Any]:
    """A logged question without what only fills files."""
    dropped = ("arguments", "token_counts", "doc_hash", "resps", "input_media")
    return {key: value for key, value in sample.items() if key not in dropped}


def _mark_hits(samples: list[dict[str, Any]], metric: str) -> None:
    """MMBench's own count, question by question: right in all of its rotations, by the harness's reading."""
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    evaluator = MMBench_Evaluator(sys_prompt="", API_KEY="", API_URL="", model_version="")
    together: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        together.setdefault(int(sample[metric]["index"]) % 1_000_000, []).append(sample)
    for rotations in together.values():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            right, _, _ = evaluator.eval_result([one[metric] for one in rotations], "static")
        right = next(iter(right.values())) if isinstance(right, dict) else right
        for one in rotations:
            one["hit"] = float(right)
            one["counted"] = int(one[metric]["index"]) < 1_000_000
