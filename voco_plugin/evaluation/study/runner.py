"""Runs a study: what is finished stays, what was killed goes on, what fails does not stop the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ...files import atomic_write_text
from .child_processes import ChildFailed, Children
from .plan import Planner, Reading, Run, Training, units
from .progress import Progress, spoken
from .records import (
    RESULTS_NAME,
    RunFolder,
    command,
    finished,
    has_checkpoint,
    read_json,
    seconds_of,
    trained,
    was_read,
)

START = 10.0
"""Seconds to start a process and load a model, which a reading does not count: for the estimate only."""
Choices = dict[str, dict[str, Any]]


@dataclasses.dataclass
class Failure:
    """A command that failed, and the runs that lack its result.

    Attributes:
        runs: their names.
        command: as a user types it; empty where a search left nothing to choose.
        status: its exit status.
        stderr: the end of what it printed.
        log: where all of it is.
    """

    runs: list[str]
    command: str
    status: int
    stderr: str
    log: str


def matches(name: str, pattern: str | None) -> bool:
    """Whether a run's name is asked for: a shell pattern, or a part of the name where it has no wildcard."""
    if pattern is None:
        return True
    wild = any(c in pattern for c in "*?[")
    return fnmatch.fnmatch(name, pattern if wild else f"*{pattern}*")


def narrowed(pattern: str | None, runs: Iterable[Run]) -> str | None:
    """``pattern``, or where it is the whole name of a run or of a method, the one that takes those alone.

    ``voco`` is a part of ``slow_voco-k1-s0`` too, and whoever names a method means that one.
    """
    runs = list(runs)
    if pattern and any(run.name == pattern for run in runs):
        return f"[{pattern[0]}]{pattern[1:]}"
    if pattern and any(run.method.name == pattern for run in runs):
        return f"[{pattern[0]}]{pattern[1:]}-k*"
    return pattern


def choose(candidates: Iterable[Run]) -> tuple[Choices, list[dict[str, Any]]]:
    """The best value on validation data for each method whose candidates are all finished.

    Returns:
        the values by method, and every candidate's accuracy; of equal ones the first listed is chosen.
    """
    by_method: dict[str, list[tuple[Run, float | None]]] = {}
    for run in candidates:
        accuracy = None
        if finished(run):
            (entry,) = read_json(run.readings[0].out)["scores"].values()
            accuracy = entry["accuracy"]
        by_method.setdefault(run.method.name, []).append((run, accuracy))
    chosen: Choices = {}
    table: list[dict[str, Any]] = []
    for method, tried in by_method.items():
        known = [(run, accuracy) for run, accuracy in tried if accuracy is not None]
        best = max(known, key=lambda pair: pair[1])[0] if len(known) == len(tried) else None
        if best is not None:
            chosen[method] = dict(best.tried)
        for run, accuracy in tried:
            table.append(
                {
                    "method": method, "num_tokens": run.num_tokens, "seed": run.seed,
                    "tried": dict(run.tried), "accuracy": accuracy, "chosen": run is best,
                }
            )  # fmt: skip
    return chosen, table


class Runner:
    """Runs the plan of one study.

    Args:
        planner: the study's.
        results: its results folder.
        children: starts the commands.
        jobs: how many at a time.
        gpus: values of ``CUDA_VISIBLE_DEVICES``, one for each job; none leaves it as it is.
        tell: gets a line for whatever happens.
        only: see :func:`matches`.
        found: gets what the search tried, once it is done.
    """

    def __init__(
        self, planner: Planner, results: Path, children: Children, *, jobs: int = 1,
        gpus: Sequence[str] = (), tell: Callable[[str], None] = lambda line: None, only: str | None = None,
        found: Callable[[list[dict[str, Any]]], None] = lambda tried: None,
    ) -> None:  # fmt: skip
        self.planner, self.children, self._tell, self.only = planner, children, tell, only
        self._telling = threading.Lock()
        self.folder, self.jobs, self.found = RunFolder(results), jobs, found
        self.failures: list[Failure] = []
        self._gpus: queue.Queue[str] | None = None
        if gpus:
            self._gpus = queue.Queue()
            for number in range(jobs):
                self._gpus.put(gpus[number % len(gpus)])

    def run(self) -> list[Run]:
        """Do what is not done; returns the runs of the study, with the values that its search chose."""
        candidates = self.wanted_candidates()
        # the values chosen decide which commands are left, not how many
        guess = {run.method.name: dict(run.tried) for run in candidates}
        self.progress = self._progress([*candidates, *self.wanted(self.planner.runs(guess))])
        self._execute(candidates)
        chosen, tried = choose(self.planner.candidates())  # those of other methods too, where they are done
        if tried:
            self.found(tried)
        runs = self.wanted(self.planner.runs(chosen))
        lost = {run.method.name for run in candidates} - set(chosen)
        ready = [run for run in runs if self.planner.tuned_as(run.method) not in lost]
        for method in sorted(lost):
            names = [run.name for run in runs if self.planner.tuned_as(run.method) == method]
            self.failures.append(Failure(names, "", 1, f"the search of {method} is not complete", ""))
        self.progress = self._progress([*candidates, *ready])
        self._execute(ready)
        return self.planner.runs(chosen)

    def tell(self, line: str) -> None:
        with self._telling:
            self._tell(line)

    def wanted(self, runs: Iterable[Run]) -> list[Run]:
        return [run for run in runs if matches(run.name, self.only)]

    def wanted_candidates(self) -> list[Run]:
        """The runs of the search that the runs asked for depend on."""
        candidates = self.planner.candidates()
        if self.only is None:
            return candidates
        guess = {run.method.name: dict(run.tried) for run in candidates}
        methods = {self.planner.tuned_as(run.method) for run in self.wanted(self.planner.runs(guess))}
        return [run for run in candidates if run.method.name in methods or matches(run.name, self.only)]

    def _progress(self, runs: Sequence[Run]) -> Progress:
        """With what is finished already counted as done."""
        found = units(runs)
        progress = Progress(
            [t for t, _ in found if t is not None], [r for _, rs in found for r in rs], self.jobs
        )
        for training, readings in found:
            if training is not None and trained(training):
                progress.trained(training, START + seconds_of(read_json(training.folder / RESULTS_NAME)))
            for reading in readings:
                if was_read(reading):
                    scores = read_json(reading.out)["scores"].values()
                    progress.read(reading, START + sum(entry["seconds"] for entry in scores))
        return progress

    # -- doing it

    def _execute(self, runs: Sequence[Run]) -> None:
        found = units(runs)
        for run in runs:
            self._record(run)
        todo = [
            (t, rs) for t, rs in found if (t is not None and not trained(t)) or not all(map(was_read, rs))
        ]
        with ThreadPoolExecutor(max(1, self.jobs)) as pool:
            futures = [pool.submit(self._unit, training, readings, runs) for training, readings in todo]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.children.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _unit(self, training: Training | None, readings: list[Reading], runs: Sequence[Run]) -> None:
        with self._gpu() as environment:
            mine = [run for run in runs if any(r in readings for r in run.readings)]
            if training is not None and not trained(training):
                work = functools.partial(self._train, training, mine, environment)
                if not self._guarded(work, mine, training, readings):
                    return
            if training is not None:
                _drop_optimizers(training)
            for reading in readings:
                if was_read(reading):
                    continue
                of = [run for run in mine if reading in run.readings]
                self._guarded(functools.partial(self._read, reading, of, environment), of, None, [reading])
        for run in mine:
            self._record(run)

    @contextlib.contextmanager
    def _gpu(self) -> Any:
        if self._gpus is None:
            yield {}
            return
        one = self._gpus.get()
        try:
            yield {"CUDA_VISIBLE_DEVICES": one}
        finally:
            self._gpus.put(one)

    def _guarded(
        self, work: Callable[[], None], runs: Sequence[Run], training: Training | None,
        readings: list[Reading],
    ) -> bool:  # fmt: skip
        """Do ``work``; a failure is written down, and costs these commands alone."""
        try:
            work()
            return True
        except ChildFailed as failure:
            names = [run.name for run in runs]
            log = self._log(training, readings)
            self.failures.append(
                Failure(names, command(failure.words), failure.status, failure.tail, str(log))
            )
            self.progress.given_up(training, readings)
            last = failure.tail.splitlines()[-1] if failure.tail else "it printed nothing"
            self.tell(self.progress.line(f"FAILED {', '.join(names)}: {failure}: {last} (log: {log})"))
            return False

    def _log(self, training: Training | None, readings: Sequence[Reading]) -> Path:
        return training.folder.with_suffix(".log") if training else readings[0].out.with_suffix(".log")

    def _train(self, training: Training, runs: Sequence[Run], environment: Mapping[str, str]) -> None:
        name = ", ".join(run.name for run in runs)
        busy = lambda: self.tell(f"{name}: another process is at it; waiting")  # noqa: E731
        with self.children.holding(training.folder.with_suffix(".lock"), busy) as lock:
            if not trained(training):
                atomic_write_text(
                    training.folder.with_suffix(".json"),
                    json.dumps(
                        {"command": command(training.words), "values": training.values}, indent=1, default=str
                    )
                    + "\n",
                )
                words = list(training.words)
                resumes = has_checkpoint(training)
                if resumes:
                    words += ["--resume_from_checkpoint", "true"]
                self.tell(f"{name}: training{' goes on from its checkpoint' if resumes else ''}")
                self.progress.start(training.key)
                self.children.run(words, self._log(training, ()), lock, environment)
                if not trained(training):
                    raise ChildFailed(words, 0, f"no {RESULTS_NAME} in {training.folder}")
        took = self.progress.trained(training)
        self.tell(self.progress.line(f"{name}: trained in {spoken(took)}"))

    def _read(self, reading: Reading, runs: Sequence[Run], environment: Mapping[str, str]) -> None:
        name = ", ".join(run.name for run in runs) or reading.key
        busy = lambda: self.tell(f"{name}: another process reads it; waiting")  # noqa: E731
        with self.children.holding(reading.out.with_suffix(".lock"), busy) as lock:
            if not was_read(reading):
                self.progress.start(reading.key)
                self.children.run(reading.words, self._log(None, [reading]), lock, environment)
                if not was_read(reading):
                    raise ChildFailed(reading.words, 0, f"no {reading.out}")
        self.progress.read(reading)
        entries = read_json(reading.out)["scores"].items()
        shown = ", ".join(f"{mode} {100 * entry['accuracy']:.1f} %" for mode, entry in entries)
        self.tell(self.progress.line(f"{name}: {shown}"))

    def _record(self, run: Run) -> None:
        if not run.searching and finished(run):
            self.folder.write(run)


def _drop_optimizers(training: Training) -> None:
    """Checkpoints of a finished training are read, never gone on from: their optimizer states go."""
    for folder in training.folder.glob("checkpoint-*"):
        for name in ("optimizer.pt", "scheduler.pt", "scaler.pt"):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()
        for sharded in folder.glob("global_step*"):
            shutil.rmtree(sharded, ignore_errors=True)
