"""What papers print for the benchmarks of :mod:`.suites`, to stand beside measured rows.

Scores as printed; the paper is VoCo-LLaMA (arXiv 2406.12275), Tables 1, 5 and 8. Other data splits, prompts,
harnesses and judges than ours: they say what order of size to expect, not who is better.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAPER = "VoCo-LLaMA (paper)"


@dataclass(frozen=True)
class Published:
    """A printed row.

    Attributes:
        tokens: an image (of videos: a frame).
        scores: by benchmark; none where only an average is printed.
        average: printed average retention, per cent.
        bound: ``upper`` or ``lower``, of the rows that others are compared with.
    """

    name: str
    tokens: int
    scores: dict[str, float] = field(default_factory=dict)
    average: float | None = None
    bound: str | None = None
    note: str = ""


def _row(columns: tuple[str, ...], name: str, tokens: int, *scores: float, **more: object) -> Published:
    return Published(name, tokens, dict(zip(columns, scores, strict=True)), **more)  # type: ignore[arg-type]


_JUDGED = "answers judged by another model, not matched"
_T1 = ("GQA", "MMB", "MME", "POPE", "SEED", "SQA-I", "VQA-v2")
_T5 = (
    "RefCOCO val", "RefCOCO test A", "RefCOCO test B", "RefCOCO+ val", "RefCOCO+ test A", "RefCOCO+ test B",
    "RefCOCOg val", "RefCOCOg test",
)  # fmt: skip
_T8 = ("MSVD-QA", "MSRVTT-QA", "ActivityNet-QA")

ROWS: dict[str, tuple[Published, ...]] = {
    "paper-image": (
        _row(
            _T1, f"{PAPER}, upper bound", 576, 61.1, 64.0, 1487.2, 85.0, 57.9, 66.5, 77.7, average=100.0,
            bound="upper",
        ),
        _row(_T1, PAPER, 1, 57.0, 58.8, 1323.3, 81.4, 53.7, 65.4, 72.3, average=83.7),
        _row(_T1, "average pooling (paper)", 1, 52.9, 55.5, 1210.3, 79.1, 50.3, 62.2, 65.0, average=64.1),
        _row(_T1, "Q-Former (paper)", 1, 51.1, 51.7, 1079.7, 77.3, 47.2, 62.7, 63.4, average=57.2),
        _row(
            _T1, f"{PAPER}, lower bound", 1, 37.7, 22.3, 617.3, 53.9, 36.9, 60.7, 41.2, average=0.0,
            bound="lower",
        ),
        Published(
            "HTC-VLM (its paper)", 1, average=87.2,
            note="580 tokens to 1, seven benchmarks; the average is what is printed, by its own definition",
        ),
    ),
    "paper-fine": (
        _row(
            _T5, f"{PAPER}, upper bound", 256, 87.01, 90.61, 80.24, 81.60, 87.36, 72.12, 82.27, 82.19,
            average=100.0, bound="upper",
        ),
        _row(_T5, PAPER, 8, 85.17, 88.92, 79.21, 80.02, 85.13, 70.22, 80.36, 80.64, average=90.7,
             note="its printed average, 90.7, counts GRIT, too"),
        _row(_T5, PAPER, 1, 83.29, 86.89, 77.87, 77.62, 83.02, 67.74, 78.32, 78.06, average=79.9,
             note="its printed average, 79.9, counts GRIT, too"),
        _row(
            _T5, f"{PAPER}, lower bound", 1, 68.34, 72.96, 68.03, 62.58, 64.77, 50.65, 62.30, 62.99,
            average=0.0, bound="lower",
        ),
    ),
    "paper-video": (
        _row(_T8, f"{PAPER}, 224", 2, 72.3, 61.1, 47.9, note=_JUDGED),
        _row(_T8, f"{PAPER}, 336", 2, 72.6, 61.2, 47.9, note=_JUDGED),
        _row(_T8, f"{PAPER}, 224", 8, 73.4, 62.0, 48.5, note=_JUDGED),
        _row(_T8, f"{PAPER}, 336", 8, 73.5, 62.3, 48.6, note=_JUDGED),
        _row(_T8, "LLaMA-VID (paper)", 2, 69.7, 57.7, 47.4, note=_JUDGED),
    ),
    "gridworld": (),
}  # fmt: skip
