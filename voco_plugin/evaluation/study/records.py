"""What is finished, read off the disk, and the one JSON of each finished run.

A training is finished when its folder holds ``train_results.json``, which ``voco train`` writes last; a
reading when its JSON is there, which ``voco eval --out`` writes whole or not at all. So it does not matter
who ran the command: the study, a former one that was killed, or a cluster.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...files import atomic_write_text
from .plan import Reading, Run, Training

FORMAT_VERSION = 1
RESULTS_NAME = "train_results.json"
QUESTIONS = "questions.json"


def read_json(path: Path) -> Any:
    """A JSON file's value; ``None`` where there is none.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as problem:
        raise ValueError(f"{path} is not JSON ({problem}); remove it to compute it again.") from None


def trained(training: Training) -> bool:
    """Whether it is finished, the checkpoints of its curve included."""
    return (training.folder / RESULTS_NAME).is_file()


def has_checkpoint(training: Training) -> bool:
    """Whether it was begun and can go on."""
    folders = [*training.folder.glob("checkpoint-*"), *training.folder.glob("_replaced-checkpoint-*")]
    return any((folder / "trainer_state.json").is_file() for folder in folders)


def was_read(reading: Reading) -> bool:
    """Whether it is finished."""
    return reading.out.is_file()


def finished(run: Run) -> bool:
    """Whether all of a run is."""
    return (run.training is None or trained(run.training)) and all(map(was_read, run.readings))


def command(words: Iterable[str]) -> str:
    """As a user types it."""
    return shlex.join(["voco", *words])


def record(run: Run) -> dict[str, Any]:
    """The JSON of a finished run."""
    scores, curve = [], []
    environment = None
    for reading in run.readings:
        found = read_json(reading.out)
        environment = environment or found.get("environment")
        for entry in found["scores"].values():
            kept = {k: v for k, v in entry.items() if k != "answers"}
            kept |= {"set": reading.set_name, "images": found["images"], "questions": found["questions"]}
            if reading.curve:
                kept.pop("correct")
                curve.append(kept)
            else:
                scores.append(kept)
    training = None
    if run.training is not None:
        training = read_json(run.training.folder / RESULTS_NAME)
        training["key"] = run.training.key
    return {
        "format_version": FORMAT_VERSION,
        "name": run.name,
        "method": run.method.name,
        "label": run.method.shown,
        "bound": run.method.bound,
        "num_tokens": run.num_tokens,
        "seed": run.seed,
        "key": run.key,
        "values_key": run.values_key,
        "tried": dict(run.tried),
        "values": run.training.values if run.training else None,
        "commands": [
            *([command(run.training.words)] if run.training else []),
            *(command(r.words) for r in run.readings),
        ],
        "training": training,
        "environment": environment,
        "scores": scores,
        "curve": curve,
    }  # fmt: skip


def questions(runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """Of each set: the type and the row of each question, in the order they were asked, and which turn it was
    where it was asked in a conversation.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for reading in run.readings:
            if not reading.curve and reading.set_name not in found and was_read(reading):
                read = read_json(reading.out)
                kept = ("types", "rows", "turns")
                found[reading.set_name] = {key: read[key] for key in kept if key in read}
    return found


class RunFolder:
    """``RESULTS/runs``: one JSON a finished run; next to it ``questions.json``."""

    def __init__(self, results: Path) -> None:
        self.folder = Path(results) / "runs"

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def write(self, run: Run) -> dict[str, Any]:
        """Write the record of a finished run, unless it stands there."""
        before = self.read(run)
        if before is not None and before["key"] == run.key:
            return before
        made = record(run)
        self._keep_questions(run)
        atomic_write_text(self.path(run), json.dumps(made, indent=1, ensure_ascii=False, default=str) + "\n")
        return made

    def _keep_questions(self, run: Run) -> None:
        path = self.folder.parent / QUESTIONS
        before = read_json(path) or {}
        asked = {**before, **questions([run])}
        if asked != before:
            atomic_write_text(path, json.dumps(asked, separators=(",", ":")) + "\n")

    def questions(self) -> dict[str, dict[str, Any]]:
        """Of each set that was read: the type and the row of each question, in the order of ``correct``."""
        return read_json(self.folder.parent / QUESTIONS) or {}

    def read(self, run: Run) -> dict[str, Any] | None:
        """The record under the run's name, of whatever definition; ``None`` where there is none."""
        return read_json(self.path(run))

    def current(self, runs: Iterable[Run], *, by: str = "key") -> list[dict[str, Any]]:
        """The records of ``runs`` that are there and made under this definition (``by``: ``values_key`` where
        the files that a run was made from are not there)."""
        found = []
        for run in runs:
            made = self.read(run)
            if made is not None and made[by] == getattr(run, by):
                found.append(made)
        return found


def seconds_of(result: Mapping[str, Any]) -> float:
    """Seconds of a whole training: of one that went on from a checkpoint, scaled up by its steps."""
    steps, resumed = result.get("steps") or 0, result.get("resumed_at") or 0
    share = (steps - resumed) / steps if steps > resumed else 1.0
    return float(result.get("train_runtime", 0.0)) / share
