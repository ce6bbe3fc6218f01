"""What costs how much, measured so that ratios can be trusted (``voco bench``, docs/performance.md).

``timing`` calls each way in turn within one process; ``result_file`` says on what machine; ``shapes`` builds
models of known sizes with random weights. ``attention``, ``training_step``, ``inference``, ``serving``,
``long_video`` and ``context_length`` are the benchmarks: plain functions that return JSON values (``table``
puts the paper's Table 7 together). ``compare_stage_two`` times a given model and processor.
"""

from .compare_stage_two import stage_two_times
from .timing import interleaved_medians

__all__ = ["interleaved_medians", "stage_two_times"]
