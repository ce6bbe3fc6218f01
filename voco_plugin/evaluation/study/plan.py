"""From a study to its runs: which trainings, which readings, and what each is called on disk.

    WORK/trained/KEY/             output folder of one `voco train`; train_results.json says it is finished
    WORK/trained/KEY.json         what KEY stands for
    WORK/trained/KEY.log          what the child printed
    WORK/read/KEY.json            one `voco eval --out`
    RESULTS/runs/NAME.json        a finished run: all that tables and plots need

Keys are of content, so studies with one WORK share what they have in common.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..text_before import content_of
from .definition import EvalSet, Method, Study
from .run_keys import Fingerprint, digest, training_key, training_values

Resolve = Callable[[str, Sequence[str]], Mapping[str, Any]]
"""Recipe and override words → the recipe's checked values."""
VALIDATION = "validation"


@dataclasses.dataclass(frozen=True)
class Training:
    """One ``voco train``.

    Attributes:
        key: of everything that determines it.
        words: the command, without ``voco``.
        folder: where it trains to.
        values: the recipe's values that determine it.
        steps: its ``max_steps``, where it has one.
    """

    key: str
    words: tuple[str, ...]
    folder: Path
    values: Mapping[str, Any] = dataclasses.field(hash=False, compare=False)
    steps: int | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """One ``voco eval``.

    Attributes:
        key: of everything that determines it.
        words: the command, without ``voco``.
        out: the JSON that it writes.
        set_name: the name of the set that is read.
        training: whose checkpoint is read; ``None`` for the base model.
        curve: whether it reads the checkpoints of the curve, and not the end of training.
    """

    key: str
    words: tuple[str, ...]
    out: Path
    set_name: str
    training: Training | None = None
    curve: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """One method at one K with one seed: a training (a bound may have none of its own), and its readings."""

    name: str
    method: Method = dataclasses.field(hash=False, compare=False)
    num_tokens: int | None
    seed: int | None
    training: Training | None
    readings: tuple[Reading, ...]
    tried: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, compare=False)
    searching: bool = False

    @property
    def key(self) -> str:
        """Of the whole run: the training's and every reading's."""
        return digest([self.training.key if self.training else None, *(r.key for r in self.readings)])

    @property
    def values_key(self) -> str:
        """As :attr:`key`, of what the YAML and the recipe say alone, whatever files hold."""
        shown = [r.words[2:] for r in self.readings]  # without `eval MODEL`
        plain = [[w for w in words if w != str(r.out)] for words, r in zip(shown, self.readings, strict=True)]
        return digest([self.training.values if self.training else None, plain])


def as_words(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as ``--key value`` words: lists and sections in YAML's flow style, which is JSON's."""
    words: list[str] = []
    for key, value in overrides.items():
        text = value if isinstance(value, str) else json.dumps(value)
        words += [f"--{key}", text]
    return words


class Planner:
    """Makes the runs of one study.

    Args:
        study: what to run.
        work: the folder of trainings and readings, shared between studies.
        resolve: the recipe's values under override words; raises for what is wrong.
        fingerprint: see :func:`voco_plugin.evaluation.study.run_keys.fingerprint`.
        count_rows: the number of rows of a training set and split, for ``search.last``.
    """

    def __init__(
        self,
        study: Study,
        work: Path,
        resolve: Resolve,
        fingerprint: Fingerprint,
        count_rows: Callable[[str, str | None], int],
    ) -> None:
        self.study, self.work, self.fingerprint = study, Path(work), fingerprint
        resolved = functools.lru_cache(maxsize=None)(resolve)  # checking a recipe takes a moment
        self.resolve: Resolve = lambda recipe, words: resolved(recipe, tuple(words))
        common: dict[str, Any] = {}
        for key, value in (
            ("model_name_or_path", study.model),
            ("dataset_name", study.data),
            ("image_folder", study.image_folder),
        ):
            if value is not None:
                common[key] = value
        values = self.resolve(study.recipe, as_words(common | study.overrides))
        self.model = values.get("model_name_or_path")
        self.data = values.get("dataset_name")
        self.split = values.get("dataset_train_split")
        self.image_folder = values.get("image_folder")
        self.held_out = study.search.last if study.search else None
        self.rows: int | None = None
        if self.held_out:
            rows = self.rows = count_rows(str(self.data), self.split)
            if rows <= self.held_out:
                raise ValueError(
                    f"search.last={self.held_out} of {rows} rows of {self.data} leaves none to train on."
                )
            common["max_train_samples"] = rows - self.held_out
        self.common = common

    # -- the runs

    def runs(self, chosen: Mapping[str, Mapping[str, Any]]) -> list[Run]:
        """The study's runs, in the order of its methods, with the values chosen for each that trains."""
        found: list[Run] = []
        for method in self.study.methods.values():
            if method.bound in ("base", "blind"):
                readings = self._readings(None, method, None)
                found.append(Run(method.name, method, None, None, None, readings))
                continue
            for k, seed in itertools.product(self.tokens_of(method), method.seeds or self.study.seeds):
                found.append(self._run(method, k, seed, chosen))
        return found

    def candidates(self) -> list[Run]:
        """The runs of the search: every combination for every method that trains."""
        search = self.study.search
        if search is None:
            return []
        keys = list(search.over)
        found = []
        for method in self.study.methods.values():
            if not method.trains or method.tuned_as is not None:
                continue
            k = search.num_tokens or self.tokens_of(method)[0]
            for values in itertools.product(*search.over.values()):
                tried = dict(zip(keys, values, strict=True))
                # with overrides of its own it is not a run of the study, and has no curve
                training = self._training(
                    method, k, search.seed, tried | search.overrides, curve=not search.overrides
                )
                shown = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in tried.items())
                name = f"search-{method.name}-k{k}-{shown}".replace("/", "_")
                readings = (self._validation(training, method),)
                found.append(Run(name, method, k, search.seed, training, readings, tried, searching=True))
        return found

    def tokens_of(self, method: Method) -> list[int]:
        """The K's of a method."""
        return method.num_tokens or self.study.num_tokens

    def tuned_as(self, method: Method) -> str:
        """The method whose search says this one's values: its own, unless it names another or reads the upper
        bound's checkpoint."""
        source = (self.study.upper or method) if method.bound == "lower" else method
        return source.tuned_as or source.name

    def _run(self, method: Method, k: int, seed: int, chosen: Mapping[str, Mapping[str, Any]]) -> Run:
        source, at = method, k
        if method.bound == "lower":
            source = self.study.upper or method
            at = k if k in self.tokens_of(source) else self.tokens_of(source)[0]
        tried = chosen.get(self.tuned_as(method), {})
        training = self._training(source, at, seed, tried)
        name = f"{method.name}-k{k}-s{seed}"
        readings = self._readings(training, method, k)
        return Run(name, method, k, seed, None if method.bound == "lower" else training, readings, tried)

    # -- commands

    def _training(
        self, method: Method, k: int, seed: int, tried: Mapping[str, Any], *, curve: bool = True
    ) -> Training:
        study = self.study
        steps_read = study.curve if curve else None
        overrides = {**self.common, **study.overrides, "voco.num_tokens": k, "seed": seed}
        if method.bound == "upper":
            overrides["voco.rule"] = "causal"
        overrides |= method.overrides | dict(tried)
        if steps_read:
            overrides["save_at_steps"] = steps_read
        words = as_words(overrides)
        values = self.resolve(study.recipe, words)
        key = training_key(values, self.fingerprint)
        folder = self.work / "trained" / key
        steps = values.get("max_steps")
        steps = steps if isinstance(steps, int) and steps > 0 else None
        if steps is not None and steps_read and steps_read[-1] > steps:
            raise ValueError(
                f"curve: step {steps_read[-1]} is beyond max_steps={steps} of method {method.name}; "
                "leave it out."
            )
        if steps_read and values.get("save_total_limit"):
            raise ValueError(
                f"curve reads every checkpoint, and save_total_limit={values['save_total_limit']} deletes "
                "some; set it to null in overrides."
            )
        return Training(
            key,
            ("train", study.recipe, *words, "--output_dir", str(folder)),
            folder,
            training_values(values),
            steps,
        )

    def _readings(self, training: Training | None, method: Method, k: int | None) -> tuple[Reading, ...]:
        study = self.study
        tokens = None if k is None else (method.eval_num_tokens or study.eval_num_tokens)
        if k is not None and tokens is None and method.bound == "lower":
            tokens = [k]
        found = [
            self._reading(training, method, name, data, tokens=tokens)
            for name, data in study.eval_data.items()
        ]
        if training is not None and method.bound != "lower":
            name, data = next(iter(study.eval_data.items()))
            if study.curve:
                found.append(self._reading(training, method, name, data, curve=True))
        return tuple(found)

    def _validation(self, training: Training, method: Method) -> Reading:
        search = self.study.search
        assert search is not None
        if search.data is not None:
            data = EvalSet(search.data, search.image_folder or self.image_folder)
            return self._reading(training, method, VALIDATION, data)
        data = EvalSet(str(self.data), self.image_folder, self.split)
        return self._reading(training, method, VALIDATION, data, rows=f"-{search.last}:")

    def _reading(
        self, training: Training | None, method: Method, set_name: str, data: EvalSet, *,
        tokens: Iterable[int] | None = None, curve: bool = False, rows: str | None = None,
    ) -> Reading:  # fmt: skip
        study = self.study
        if training is None and self.model is None:
            raise ValueError(
                f"bound: {method.bound} reads the base model, and neither the study nor its recipe names "
                "one; add model: to the study."
            )
        model = str(self.model) if training is None else str(training.folder)
        options: dict[str, Any] = {"mode": method.read_as, "max-new-tokens": study.max_new_tokens}
        if tokens is not None:
            options["num-tokens"] = ",".join(map(str, tokens))
        more: dict[str, Any] = {"split": data.split, "rows": rows}
        more |= {"turns": data.turns or None, "text-before": data.text_before}
        limits = [data.limit]
        if curve:
            more["steps"] = ",".join(map(str, study.curve or ()))
            limits.append(study.curve_images)
        more["limit"] = min((one for one in limits if one is not None), default=None)
        options |= {name: value for name, value in more.items() if value is not None}
        source = self.fingerprint(model) if training is None else training.key
        keyed = dict(options)
        if data.text_before is not None:
            keyed["text-before"] = content_of(data.text_before)  # a file counts by what it holds
        key = digest([source, self.fingerprint(data.data), keyed])
        out = self.work / "read" / f"{key}.json"
        words = ["eval", model, "--data", data.data]
        folder = data.image_folder or self.image_folder
        if folder is not None:
            words += ["--image-folder", folder]
        words += [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        words += ["--batch-size", str(study.batch_size), "--out", str(out)]
        return Reading(key, tuple(words), out, set_name, training, curve)


def units(runs: Sequence[Run]) -> list[tuple[Training | None, list[Reading]]]:
    """What is done together: each training once, with every reading of its checkpoints; the base's last.

    Two runs may share a training (the lower bound reads the upper bound's), and two a reading.
    """
    order: dict[str, tuple[Training | None, dict[str, Reading]]] = {}
    for run in runs:
        for reading in run.readings:
            key = reading.training.key if reading.training else f"base {reading.key}"
            order.setdefault(key, (reading.training, {}))[1].setdefault(reading.key, reading)
    return [(training, list(readings.values())) for training, readings in order.values()]
