"""What a `voco` command prints, on stdout or as its one line of error."""

from __future__ import annotations

import pytest

from voco_plugin.cli import main

SHORT = [
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "2",
    "--logging_steps",
    "1",
    "--disable_tqdm",
    "true",
]


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints on stdout; it must succeed."""
    capsys.readouterr()
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line a command prints on stderr; its status must be 2, and stdout empty."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    found = capsys.readouterr()
    assert found.out == "" and "Traceback" not in found.err
    lines = [line for line in found.err.splitlines() if line.startswith("voco")]
    assert len(lines) == 1 and found.err.rstrip().endswith(lines[0]), found.err
    return lines[0]
