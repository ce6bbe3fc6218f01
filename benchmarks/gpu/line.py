"""What the scripts here share: a command with other defaults, whose last line is its result as JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(what: str, defaults: Mapping[str, str], argv: Sequence[str]) -> int:
    """`voco bench WHAT` with `defaults` where `argv` says nothing, then one line of JSON."""
    from voco_plugin.cli import main

    given = {argument.partition("=")[0] for argument in argv}
    more = [part for name, value in defaults.items() if name not in given for part in (name, value)]
    with tempfile.TemporaryDirectory() as folder:
        own = [] if "--out" in given else ["--out", str(Path(folder) / "result.json")]
        arguments = [*more, *argv, *own]
        status = main(["bench", what, *arguments])
        if status == 0 and "--help" not in given and "-h" not in given:
            values = [a.partition("=") for a in arguments]
            out = next(
                inline or arguments[i + 1] for i, (name, _, inline) in enumerate(values) if name == "--out"
            )
            print(json.dumps(json.loads(Path(out).read_text(encoding="utf-8"))))
    return status
