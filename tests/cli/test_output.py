"""What is printed: progress on terminals alone, sizes in words that are true."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from paths import ROOT
from voco_plugin.cli.output import size_words

CODE = """
from voco_plugin.cli import output
output.status("loading a model")
with output.progress(total=3, unit="image") as bar:
    bar.update(3)
output.emit("done")
"""


def seen_on_a_terminal(columns: int) -> str:
    """What a person sees of :data:`CODE` at a terminal of so many columns; 0: it does not say."""
    import fcntl
    import struct
    import termios

    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    done = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=its, stderr=its, stdin=its, env={"PYTHONPATH": str(ROOT)}
    )
    os.close(its)
    found = b""
    while True:
        try:
            part = os.read(mine, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        found += part
    os.close(mine)
    assert done.wait() == 0
    return found.decode()


@pytest.mark.parametrize("columns", [0, 60])
def test_a_person_at_a_terminal_sees_what_happens(columns: int) -> None:
    seen = seen_on_a_terminal(columns)
    assert seen.startswith("loading a model") and "3/3 [" in seen and "image/s" in seen


def test_a_log_file_gets_results_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (1600, 100, "16 times smaller"),
        (250, 100, "2.5 times smaller"),
        (400, 100, "4 times smaller"),
        (103, 100, "the same size"),
        (100, 103, "the same size"),
        (100, 130, "1.3 times larger"),
        (1000, 101, "9.9 times smaller"),
    ],
)
def test_what_is_larger_is_not_called_smaller(before: int, after: int, words: str) -> None:
    assert size_words(before, after) == words
    joined = " as x" if words == "the same size" else " than x"
    assert size_words(before, after, "x") == words + joined
