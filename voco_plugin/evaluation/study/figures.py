"""From the records of finished runs to what tables and plots show: means, ratios, intervals, differences.

Scores are shares, 0 … 1. With one test set its columns are the question types; with several, the sets, and
the average over them is the paper's: ratios first, then their mean.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..intervals import Resampler, interval
from ..metrics import raw_ratio, retention
from .definition import Study
from .records import seconds_of

Interval = tuple[float, float] | None


@dataclasses.dataclass
class Row:
    """One method at one K.

    Attributes:
        method, label, bound: as the study says.
        trained_tokens: K in training; ``None`` for the base model.
        num_tokens: K in reading; ``None`` where no VoCo token is read.
        seeds: of ``per_seed``.
        per_seed: each seed's accuracy, the mean over sets.
        accuracy, accuracy_interval: the mean over seeds.
        raw, raw_interval: x / upper.
        retention, retention_interval: (x - lower) / (upper - lower); ``None`` without bounds apart.
        columns: accuracy by question type, or by set.
        column_raw, column_retention: the ratios of each column.
        train_seconds: of one training, the mean over seeds; ``scaled`` where one of them was resumed.
        trained_parameters: weights that trained.
        cache_bytes: what an image is kept as.
        tried: the values that the search chose.
    """

    method: str
    label: str
    bound: str | None
    trained_tokens: int | None
    num_tokens: int | None
    seeds: list[int | None]
    per_seed: list[float]
    accuracy: float
    accuracy_interval: Interval
    columns: dict[str, float]
    raw: float | None = None
    raw_interval: Interval = None
    retention: float | None = None
    retention_interval: Interval = None
    column_raw: dict[str, float | None] = dataclasses.field(default_factory=dict)
    column_retention: dict[str, float | None] = dataclasses.field(default_factory=dict)
    train_seconds: float | None = None
    scaled: bool = False
    trained_parameters: int | None = None
    cache_bytes: float | None = None
    tried: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Difference:
    """``method`` minus ``reference``, both at K ``num_tokens``, paired over questions.

    Attributes:
        difference, interval: in accuracy, 0 … 1.
        clear: whether the interval leaves 0 out.
    """

    method: str
    reference: str
    num_tokens: int | None
    difference: float
    interval: tuple[float, float]
    clear: bool


Key = tuple[str, int | None, int | None]


class Figures:
    """The figures of one study.

    Args:
        study: its definition.
        records: of its finished runs (:func:`voco_plugin.evaluation.study.records.record`).
        questions: of each set, ``{"types": …, "rows": …}``.
        resamples: replicates of the bootstrap.

    Raises:
        ValueError: records do not answer the same questions.
    """

    def __init__(
        self,
        study: Study,
        records: Iterable[Mapping[str, Any]],
        questions: Mapping[str, Mapping[str, Any]],
        resamples: int = 2000,
    ) -> None:
        self.study, self.questions = study, questions
        self.sets = [name for name in study.eval_data if name in questions]
        self._draws: dict[str, Resampler] = {}
        for stream, name in enumerate(self.sets):
            rows = questions[name]["rows"]
            groups = rows if study.resample == "images" else None
            self._draws[name] = Resampler(len(rows), groups=groups, resamples=resamples, stream=stream)
        order = {name: number for number, name in enumerate(study.methods)}
        self.records = sorted(
            records, key=lambda r: (order[r["method"]], r["num_tokens"] or 0, r["seed"] or 0)
        )
        self._correct = self._by_key()
        self.rows = [self._row(key) for key in self._correct]
        self._add_ratios()
        self._add_bytes()
        self.differences = self._compare()
        self.curves = self._curves()

    # -- rows

    def _by_key(self) -> dict[Key, dict[str, dict[int | None, np.ndarray]]]:
        """(method, K trained, K read) → set → seed → right answers ``(Q,)``; of whole keys only."""
        found: dict[Key, dict[str, dict[int | None, np.ndarray]]] = {}
        for record in self.records:
            for entry in record["scores"]:
                key = (record["method"], record["num_tokens"], entry["num_tokens"])
                right = np.frombuffer(entry["correct"].encode(), dtype=np.uint8) - ord("0")
                name = entry["set"]
                if name in self._draws and len(right) != self._draws[name].num_questions:
                    raise ValueError(
                        f"{record['name']} answered {len(right)} questions of {name}, others "
                        f"{self._draws[name].num_questions}; remove its record to compute it again."
                    )
                found.setdefault(key, {}).setdefault(name, {})[record["seed"]] = right
        return {key: sets for key, sets in found.items() if all(name in sets for name in self.sets)}

    def _of(self, key: Key) -> list[Mapping[str, Any]]:
        return [r for r in self.records if (r["method"], r["num_tokens"]) == key[:2]]

    def _matrix(self, key: Key, name: str) -> np.ndarray:
        by_seed = self._correct[key][name]
        return np.stack([by_seed[seed] for seed in sorted(by_seed, key=lambda s: s or 0)])

    def _replicates(self, key: Key, name: str) -> np.ndarray:
        """Of the mean of one set. The two bounds draw the same seeds: one reads the other's checkpoint."""
        bound = self.study.methods[key[0]].bound
        drawn_as = "bounds" if bound in ("upper", "lower") else f"{key[0]} {key[1]}"
        return self._draws[name].means(self._matrix(key, name), drawn_as)

    def _row(self, key: Key) -> Row:
        method = self.study.methods[key[0]]
        records = self._of(key)
        by_set = {name: self._matrix(key, name) for name in self.sets}
        seeds = sorted(self._correct[key][self.sets[0]], key=lambda s: s or 0)
        per_seed = np.mean([matrix.mean(axis=1) for matrix in by_set.values()], axis=0)
        replicates = np.mean([self._replicates(key, name) for name in self.sets], axis=0)
        row = Row(
            method.name, method.shown, method.bound, key[1], key[2], list(seeds),
            [float(value) for value in per_seed], float(per_seed.mean()), interval(replicates),
            self._columns(key), tried=dict(records[0]["tried"]),
        )  # fmt: skip
        trainings = [r["training"] for r in records if r["training"] is not None]
        if trainings:
            row.train_seconds = statistics.mean(map(seconds_of, trainings))
            row.scaled = any(t.get("resumed_at") for t in trainings)
            row.trained_parameters = trainings[0].get("trained_parameters")
        return row

    def _columns(self, key: Key) -> dict[str, float]:
        if len(self.sets) > 1:
            return {name: float(self._matrix(key, name).mean()) for name in self.sets}
        types = np.asarray(self.questions[self.sets[0]]["types"])
        matrix = self._matrix(key, self.sets[0])
        return {str(kind): float(matrix[:, types == kind].mean()) for kind in np.unique(types)}

    # -- bounds

    def bound(self, bound: str, num_tokens: int | None) -> Row | None:
        """The upper or lower bound's row at this K, else at its smallest; the base stands in for no upper."""
        found = [row for row in self.rows if row.bound == bound]
        if not found:
            return self.bound("base", num_tokens) if bound == "upper" else None
        same = [row for row in found if row.num_tokens == num_tokens]
        return same[0] if same else min(found, key=lambda row: row.num_tokens or 0)

    def _key(self, row: Row) -> Key:
        return (row.method, row.trained_tokens, row.num_tokens)

    def _add_ratios(self) -> None:
        for row in self.rows:
            upper, lower = self.bound("upper", row.num_tokens), self.bound("lower", row.num_tokens)
            if upper is None:
                continue
            row.raw, row.raw_interval = self._ratio(row, lambda x, u: x / u, upper)
            row.column_raw = {
                name: raw_ratio(value, upper.columns[name]) if upper.columns[name] > 0 else None
                for name, value in row.columns.items()
            }
            if lower is None:
                continue
            row.retention, row.retention_interval = self._ratio(
                row, lambda x, u, low: (x - low) / (u - low), upper, lower
            )
            row.column_retention = {
                name: retention(value, lower.columns[name], upper.columns[name])
                if upper.columns[name] > lower.columns[name]
                else None
                for name, value in row.columns.items()
            }

    def _ratio(self, row: Row, ratio: Callable[..., Any], *bounds: Row) -> tuple[float | None, Interval]:
        """A ratio of ``row`` to bounds, the mean over sets, and its interval; ``None`` where it has none."""
        points, replicates, whole = [], [], True
        for name in self.sets:
            keys = [self._key(r) for r in (row, *bounds)]
            means = [float(self._matrix(key, name).mean()) for key in keys]
            drawn = [self._replicates(key, name) for key in keys]
            if means[1] <= (means[2] if len(means) > 2 else 0):
                return None, None
            # where bounds meet in some replicate the ratio has no interval
            whole = whole and bool((drawn[1] > (drawn[2] if len(drawn) > 2 else 0)).all())
            points.append(ratio(*means))
            if whole:
                replicates.append(ratio(*drawn))
        return float(np.mean(points)), interval(np.mean(replicates, axis=0)) if whole else None

    def _add_bytes(self) -> None:
        """Measured where a cache was read; else what the same model takes for as many tokens."""
        sizes: dict[Key, Mapping[str, float]] = {}
        for record in self.records:
            for entry in record["scores"]:
                if entry.get("cache"):
                    sizes[record["method"], record["num_tokens"], entry["num_tokens"]] = entry["cache"]
        any_size = next(iter(sizes.values()), None)
        for row in self.rows:
            size = sizes.get(self._key(row))
            if size is not None and row.bound != "lower":
                row.cache_bytes = size["bytes"]
            elif any_size is not None and row.bound in ("upper", "base"):
                row.cache_bytes = any_size["bytes"] / any_size["tokens"] * any_size["vision_tokens"]
            elif any_size is not None and row.bound is None and row.num_tokens is not None:
                row.cache_bytes = any_size["bytes"] / any_size["tokens"] * row.num_tokens

    # -- comparisons

    def _compare(self) -> list[Difference]:
        name = self.study.compared_with
        references = {row.num_tokens: row for row in self.rows if row.method == name}
        found = []
        for row in self.rows:
            other = references.get(row.num_tokens)
            if row.bound is not None or row.method == name or other is None or name is None:
                continue
            points, replicates = [], []
            for one in self.sets:
                pair = self._key(row), self._key(other)
                first, second = (float(self._matrix(key, one).mean()) for key in pair)
                points.append(first - second)
                drawn = [self._replicates(key, one) for key in pair]
                replicates.append(drawn[0] - drawn[1])
            low, high = interval(np.mean(replicates, axis=0))
            found.append(
                Difference(
                    row.method, name, row.num_tokens, float(np.mean(points)), (low, high), low > 0 or high < 0
                )
            )
        return found

    def _curves(self) -> dict[tuple[str, int], dict[int, list[float]]]:
        """(method, K) → step → accuracy of each seed."""
        found: dict[tuple[str, int], dict[int, list[float]]] = {}
        for record in self.records:
            for entry in record["curve"]:
                at = found.setdefault((record["method"], record["num_tokens"]), {})
                at.setdefault(entry["step"], []).append(entry["accuracy"])
        return {key: dict(sorted(steps.items())) for key, steps in found.items()}

    def by_turn(self) -> dict[str, list[tuple[Row, dict[int, float]]]]:
        """Of each set whose questions were asked in turns: each row's accuracy by turn, over all seeds."""
        found = {}
        for name in self.sets:
            turns = np.asarray(self.questions[name].get("turns", ()))
            if turns.size:
                matrices = [(row, self._matrix(self._key(row), name)) for row in self.rows]
                found[name] = [
                    (row, {int(turn): float(right[:, turns == turn].mean()) for turn in np.unique(turns)})
                    for row, right in matrices
                ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``results.json``."""
        turns = {
            name: [
                {"method": row.method, "num_tokens": row.num_tokens, "accuracy": found} for row, found in rows
            ]
            for name, rows in self.by_turn().items()
        }
        return {
            **({"by_turn": turns} if turns else {}),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "differences": [dataclasses.asdict(one) for one in self.differences],
            "curves": [
                {"method": method, "num_tokens": k, "accuracy": {str(s): v for s, v in steps.items()}}
                for (method, k), steps in self.curves.items()
            ],
        }


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column, in order."""
    return list(dict.fromkeys(name for row in rows for name in row.columns))
