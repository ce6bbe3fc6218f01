"""What costs how much, measured so that ratios can be trusted (``voco bench``, docs/performance.md).

``timing`` calls ways in turn within one process; ``record`` says on what machine; ``shapes`` builds models of
known sizes with random weights. ``attention``, ``train``, ``inference``, ``long_video`` and ``context`` are
the benchmarks: plain functions that return JSON values. ``stage_two`` times a model and processor at hand.
"""

from .stage_two import stage_two_times
from .timing import interleaved_medians

__all__ = ["interleaved_medians", "stage_two_times"]
