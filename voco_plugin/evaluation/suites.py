"""The benchmarks of ``voco eval SUITE``: the harness's task of each, its score, and the files it needs.

A score is a function of sums over questions, so that it can be taken of any sample of them:

    mean      sum(value) / questions                       accuracy, VQA's soft accuracy
    f1        2 tp / (2 tp + fp + fn)                      POPE
    by_class  sum over classes of sum(value) / questions   MME's perception: accuracy + accuracy+ of each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REPOSITORIES = "lmms-lab-encoder"
"""The owner that the tasks of lmms-eval 0.7.3 name; earlier copies are of ``lmms-lab``."""


@dataclass(frozen=True)
class Wanted:
    """One configuration of a data set that a task loads: its Parquet files hold the questions of a split."""

    repository: str
    config: str = "default"
    split: str = "test"


@dataclass(frozen=True)
class Benchmark:
    """One column of the table.

    Attributes:
        name: as the paper's tables call it.
        task: of lmms-eval, or one that this package ships (``voco_…``).
        metric: of the task, the figure that is reported.
        kind: how it comes from the questions (the module's table).
        wanted: the data sets that it loads.
        scale: of the figure: 100 for per cent, 1 for MME's points.
        pairs: questions come in twos that must not be parted.
    """

    name: str
    task: str
    metric: str
    wanted: tuple[Wanted, ...] = ()
    kind: str = "mean"
    scale: float = 100.0
    pairs: bool = False


def _hub(name: str, *parts: tuple[str, str]) -> tuple[Wanted, ...]:
    owner = name if "/" in name else f"{REPOSITORIES}/{name}"
    return tuple(Wanted(owner, config, split) for config, split in parts)


def _located(name: str, repository: str, split: str, label: str) -> Benchmark:
    return Benchmark(
        f"{name} {label}", f"{name.lower()}_bbox_rec_{split}", "refcoco_ACC@0.5",
        _hub(repository, ("default", split)),
    )  # fmt: skip


PAPER_IMAGE = (
    Benchmark(
        "GQA", "gqa", "exact_match",
        _hub("GQA", ("testdev_balanced_instructions", "testdev"), ("testdev_balanced_images", "testdev")),
    ),
    Benchmark("MMB", "mmbench_en_dev_static", "gpt_eval_score", _hub("MMBench", ("en", "dev"))),
    Benchmark(
        "MME", "mme", "mme_perception_score", _hub("MME", ("default", "test")), "by_class", 1.0, True
    ),
    Benchmark("POPE", "pope", "pope_f1_score", _hub("POPE", ("default", "test")), "f1"),
    Benchmark("SEED", "seedbench", "seed_image", _hub("SEED-Bench", ("default", "test"))),
    Benchmark("SQA-I", "scienceqa_img", "exact_match", _hub("ScienceQA", ("ScienceQA-IMG", "test"))),
    Benchmark("VQA-v2", "vqav2_val", "exact_match", _hub("VQAv2", ("default", "validation"))),
)  # fmt: skip

PAPER_FINE = (
    _located("RefCOCO", "RefCOCO", "val", "val"),
    _located("RefCOCO", "RefCOCO", "testA", "test A"),
    _located("RefCOCO", "RefCOCO", "testB", "test B"),
    _located("RefCOCO+", "RefCOCOplus", "val", "val"),
    _located("RefCOCO+", "RefCOCOplus", "testA", "test A"),
    _located("RefCOCO+", "RefCOCOplus", "testB", "test B"),
    _located("RefCOCOg", "RefCOCOg", "val", "val"),
    _located("RefCOCOg", "RefCOCOg", "test", "test"),
    Benchmark("TextVQA", "textvqa_val", "exact_match", _hub("textvqa", ("default", "validation"))),
    Benchmark("VizWiz", "vizwiz_vqa_val", "exact_match", _hub("VizWiz-VQA", ("default", "val"))),
    Benchmark("OCRBench", "ocrbench", "ocrbench_accuracy", _hub("echo840/OCRBench", ("default", "test"))),
)

PAPER_VIDEO = (
    Benchmark("MSVD-QA", "voco_msvdqa", "exact_match"),
    Benchmark("MSRVTT-QA", "voco_msrvttqa", "exact_match"),
    Benchmark("ActivityNet-QA", "voco_activitynetqa", "exact_match"),
)

GRIDWORLD = (Benchmark("gridworld", "voco_gridworld", "exact_match"),)

SUITES: dict[str, tuple[Benchmark, ...]] = {
    "paper-image": PAPER_IMAGE,
    "paper-fine": PAPER_FINE,
    "paper-video": PAPER_VIDEO,
    "gridworld": GRIDWORLD,
}


# -- a question's part in the score

_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip


def columns(benchmark: Benchmark, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """What each question adds to the sums of the score, ``(Q, columns)``.

    Args:
        samples: as the harness logs them, one a question: its document, answer and metrics.

    Raises:
        ValueError: no question of them counts (a SEED-Bench of videos alone, MME without perception).
    """
    if benchmark.kind == "f1":
        said = [sample[benchmark.metric] for sample in samples]
        rows = [
            [
                one["ground_truth"] == "yes" and one["prediction"] == "yes",
                one["ground_truth"] == "no" and one["prediction"] == "yes",
                one["ground_truth"] == "yes" and one["prediction"] == "no",
            ]
            for one in said
        ]
        return np.asarray(rows, dtype=float).reshape(-1, 3)
    if benchmark.kind == "by_class":
        return _mme(benchmark, samples)
    rows = [
        [_value(benchmark, sample), 1.0] if _counts(benchmark, sample) else [0.0, 0.0] for sample in samples
    ]
    found = np.asarray(rows, dtype=float).reshape(-1, 2)
    if not found[:, 1].any():
        raise ValueError(f"{benchmark.name}: none of {len(samples)} questions counts for {benchmark.metric}.")
    return found


def combine(benchmark: Benchmark, sums: np.ndarray) -> np.ndarray:
    """The score of sums over questions, ``(…, columns)`` → ``(…)``, in the benchmark's scale."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if benchmark.kind == "f1":
            true, wrong = sums[..., 0], sums[..., 1] + sums[..., 2]
            return benchmark.scale * np.where(true > 0, 2 * true / (2 * true + wrong), 0.0)
        return benchmark.scale * (sums[..., 0::2] / sums[..., 1::2]).sum(axis=-1)


def score(benchmark: Benchmark, samples: Sequence[Mapping[str, Any]]) -> float:
    """The benchmark's figure over all questions."""
    return float(combine(benchmark, columns(benchmark, samples).sum(axis=0)))


def _counts(benchmark: Benchmark, sample: Mapping[str, Any]) -> bool:
    return sample.get(benchmark.metric) is not None and sample.get("counted", True)


def _value(benchmark: Benchmark, sample: Mapping[str, Any]) -> float:
    found = sample[benchmark.metric]
    if not isinstance(found, Mapping):
        return float(found)
    if benchmark.metric == "refcoco_ACC@0.5":
        return float(_overlap(found["bbox"], found["pred"]) >= 0.5)
    if benchmark.metric == "seed_image":
        return float(found["pred"].lower().strip() == found["answer"].lower().strip())
    return float(found["score"] if "score" in found else sample["hit"])


def _overlap(truth: Sequence[float], given: Sequence[float]) -> float:
    """Intersection over union of two boxes ``(left, top, right, bottom)``; 0 where both are empty."""
    width = max(0.0, min(truth[2], given[2]) - max(truth[0], given[0]))
    height = max(0.0, min(truth[3], given[3]) - max(truth[1], given[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (truth, given)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0


def _mme(benchmark: Benchmark, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Per class two columns, both at the second of a pair: accuracy + accuracy+ of its image, and 1."""
    names = list(_PERCEPTION)
    rows = np.zeros((len(samples), 2 * len(names)))
    waiting: dict[tuple[str, Any], float] = {}
    for number, sample in enumerate(samples):
        one = sample.get(benchmark.metric)
        if one is None:
            continue
        key = (one["category"], one["question_id"])
        if key not in waiting:
            waiting[key] = one["score"]
            continue
        total = waiting.pop(key) + one["score"]
        at = 2 * names.index(one["category"])
        rows[number, at : at + 2] = 50.0 * total + 100.0 * (total == 2), 1.0
    there = rows.any(axis=0).reshape(-1, 2).any(axis=1)
    if not there.any():
        raise ValueError(
            f"{benchmark.name}: none of {len(samples)} questions is a pair of a perception class."
        )
    return rows.reshape(len(samples), -1, 2)[:, there].reshape(len(samples), -1)
