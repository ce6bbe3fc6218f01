"""The progress of a grid of runs, and when it will be done."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable

from .plan import Reading, Training


def spoken(seconds: float) -> str:
    """``5 h 03 min``, ``12 min``, ``40 s``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Counts trainings (by optimizer steps, where they are known) and readings, done and to do.

    The estimate is the work left at the mean pace of what was done so far (by this process, or by a former
    one, as its results say), shared by the jobs.
    """

    def __init__(self, trainings: Iterable[Training], readings: Iterable[Reading], jobs: int) -> None:
        self.trainings = {t.key: float(t.steps or 1) for t in trainings}
        self.readings = {r.key for r in readings}
        self.total = len(self.trainings) + len(self.readings)
        self.jobs = jobs
        self._train_pace: list[float] = []
        self._read_pace: list[float] = []
        self._started: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        return self.total - len(self.trainings) - len(self.readings)

    def start(self, key: str) -> None:
        with self._lock:
            self._started[key] = time.monotonic()

    def trained(self, training: Training, seconds: float | None = None) -> float:
        """A training is done; ``seconds`` where it was done before. Returns its seconds."""
        with self._lock:
            took = self._took(training.key, seconds)
            if self.trainings.pop(training.key, None) is not None and took > 0:
                self._train_pace.append(took / (training.steps or 1))
            return took

    def read(self, reading: Reading, seconds: float | None = None) -> float:
        """A reading is done; as :meth:`trained`."""
        with self._lock:
            took = self._took(reading.key, seconds)
            if reading.key in self.readings and took > 0:
                self._read_pace.append(took)
            self.readings.discard(reading.key)
            return took

    def given_up(self, training: Training | None, readings: Iterable[Reading]) -> None:
        """These will not be done now."""
        with self._lock:
            if training is not None:
                self.trainings.pop(training.key, None)
            self.readings -= {r.key for r in readings}

    def _took(self, key: str, seconds: float | None) -> float:
        began = self._started.pop(key, None)
        if seconds is not None:
            return seconds
        return time.monotonic() - began if began is not None else 0.0

    def seconds_left(self) -> float | None:
        """``None`` where nothing says how long a step or a reading takes."""
        with self._lock:
            steps, left = sum(self.trainings.values()), len(self.readings)
            if (steps and not self._train_pace) or (left and not self._read_pace):
                return None
            work = steps * statistics.mean(self._train_pace or [0.0])
            work += left * statistics.mean(self._read_pace or [0.0])
            now = time.monotonic()
            gone = sum(now - began for began in self._started.values())
            return max(work - gone, 0.0) / max(1, self.jobs)

    def line(self, what: str) -> str:
        """``[12/90] what; 3 h 05 min left``."""
        seconds = self.seconds_left()
        left = (
            ""
            if not (self.trainings or self.readings)
            else ("; time left not known yet" if seconds is None else f"; about {spoken(seconds)} left")
        )
        return f"[{self.done}/{self.total}] {what}{left}"
