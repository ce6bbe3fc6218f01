"""Counts the samples that ``on_bad_sample=skip`` replaced; a resumed run goes on counting."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .collator import SKIPPED


class SkipCounter(TrainerCallback, ExportableState):
    """Bad samples replaced, in training since step 0 and in the evaluation that runs; counts are those of all
    processes."""

    def __init__(self) -> None:
        self.total = 0
        self.in_evaluation = 0

    def add(self, count: int, *, training: bool) -> None:
        if training:
            self.total += count
        else:
            self.in_evaluation += count

    def metrics(self, *, evaluating: bool) -> dict[str, float]:
        """What a log gets: the running total, or the evaluation's own count, which then starts again."""
        if not evaluating:
            return {SKIPPED: self.total}
        count, self.in_evaluation = self.in_evaluation, 0
        return {f"eval_{SKIPPED}": count}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": self.total}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # a checkpoint from before there was a counter has no entry, and saving expects one
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        last = saved[-1] if isinstance(saved, list) else saved
        self.total = last["attributes"]["total"] if state.global_step else 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.total and state.is_world_process_zero:
            sys.stderr.write(
                f"on_bad_sample=skip: {self.total} bad samples in {state.global_step} steps, each "
                "replaced by another row; the warnings name them\n"
            )
