"""Child processes of a study: one `voco` command each, its lock held for as long as it lives.

The lock is a file that the child inherits open: where the study is killed and its children are not, a
restarted study sees that they still run, and waits for them instead of training into the same folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VOCO = (sys.executable, "-m", "voco_plugin")
TAIL = 2000


class Stopped(Exception):
    """The study is being stopped."""


class ChildFailed(Exception):
    """A child ended with another status than 0.

    Attributes:
        words: the command.
        status: its exit status; negative: the signal that killed it.
        tail: the end of what it printed.
    """

    def __init__(self, words: Sequence[str], status: int, tail: str) -> None:
        super().__init__(f"`voco {words[0]}` ended with status {status}")
        self.words, self.status, self.tail = list(words), status, tail


class Children:
    """Starts commands and can stop them all.

    Args:
        program: what ``voco`` is called as; ``None``: this Python's.
        threads: of each child.
        environment: more variables for each child.
    """

    def __init__(
        self,
        threads: int = 1,
        program: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.program = list(VOCO if program is None else program)
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def run(
        self,
        words: Sequence[str],
        log: Path,
        lock: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run ``voco WORDS`` to its end; what it prints is appended to ``log``.

        Raises:
            ChildFailed: its status was not 0.
            Stopped: :meth:`stop` was called.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            with self._lock:
                if self.stopping.is_set():
                    raise Stopped
                child = subprocess.Popen(
                    [*self.program, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env={**self.environment, **(environment or {})},
                    pass_fds=() if lock is None else (lock,),
                )
                self._running.add(child)
            status = child.wait()
            with self._lock:
                self._running.discard(child)
        if self.stopping.is_set():
            raise Stopped
        if status:
            raise ChildFailed(words, status, _tail(log))

    def stop(self) -> None:
        """End every child and start none."""
        self.stopping.set()
        with self._lock:
            running = list(self._running)
        for child in running:
            child.terminate()

    @contextlib.contextmanager
    def holding(self, path: Path, waiting: Callable[[], None] | None = None) -> Iterator[int | None]:
        """The lock ``path``, waited for while another process holds it.

        Args:
            waiting: called once, without arguments, where it has to be waited for.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield None
            return
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        told = False
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told and waiting is not None:
                        waiting()
                    told = True
                    if self.stopping.wait(1.0):
                        raise Stopped from None
            yield handle
        finally:
            os.close(handle)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises ``KeyboardInterrupt``, so that it ends the children too, as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tail(log: Path) -> str:
    """The end of a log, cut at a line."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2 * TAIL))
        text = stream.read().decode("utf-8", errors="replace")
    return text[-TAIL:].strip()
