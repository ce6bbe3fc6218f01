"""What the figures of a training depend on: the same short training under one change at a time.

    python benchmarks/repeatability.py                       # tiny world, 20 steps each, two minutes
    python benchmarks/repeatability.py --steps 100 --out docs/results/repeatability.json

Every row is one `voco train gridworld_study_voco` in a process of its own. Compared with the first are the
logged losses and the saved weights, bit by bit. `nudged` moves one number of the starting weights by one unit
in its last place: what any other order of additions does, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from voco_plugin.benchmark.result_file import environment
from voco_plugin.files import atomic_write_text

CASES: dict[str, dict[str, Any]] = {
    "first": {},
    "again": {},
    "elsewhere": {"cwd": True},
    "a checkpoint on the way, gone on from": {"resume": True},
    "two workers load the data": {"words": ["--dataloader_num_workers", "2"]},
    "two threads": {"threads": 2},
    "two threads, again": {"threads": 2, "as": "two threads"},
    "fp32": {"words": ["--bf16", "false"]},
    "fp32, again": {"words": ["--bf16", "false"], "as": "fp32"},
    "one starting weight nudged": {"nudge": True},
    "another seed": {"words": ["--seed", "1"]},
}
"""Name → what is changed; ``as``: the row it is compared with, else ``first``."""


def voco(words: list[str], cwd: Path, threads: int = 1) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "voco_plugin", *words], cwd=cwd, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"voco {' '.join(words)}\n{done.stderr[-2000:]}")


def nudged(base: Path, out: Path) -> Path:
    """A copy of ``base`` whose largest weight of the first MLP is one unit in its last place larger."""
    out.mkdir()
    for file in base.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    name = next(n for n in sorted(weights) if n.endswith("layers.0.mlp.down_proj.weight"))
    flat = weights[name].view(-1)
    at = flat.abs().argmax()
    flat[at] = torch.nextafter(flat[at], torch.tensor(float("inf")))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def train(name: str, case: dict[str, Any], work: Path, steps: int) -> dict[str, Any]:
    out = work / "runs" / hashlib.sha256(name.encode()).hexdigest()[:8]
    base = nudged(work / "base", work / "nudged") if case.get("nudge") else work / "base"
    words = [
        "train", "gridworld_study_voco", "--model_name_or_path", str(base),
        "--dataset_name", str(work / "set" / "hf"),
        "--output_dir", str(out), "--max_steps", str(steps), "--logging_steps", "1", *case.get("words", []),
    ]  # fmt: skip
    cwd = Path(tempfile.mkdtemp(dir=work)) if case.get("cwd") else work
    if case.get("resume"):
        words += ["--save_at_steps", f"[{steps // 2}]"]
    voco(words, cwd, case.get("threads", 1))
    if case.get("resume"):
        (out / "model.safetensors").unlink()
        voco([*words, "--resume_from_checkpoint", str(out / f"checkpoint-{steps // 2}")], cwd)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    return {"losses": losses, "weights": load_file(out / "model.safetensors")}


def compared(found: dict[str, Any], with_: dict[str, Any]) -> dict[str, Any]:
    """Where two trainings part: the first step whose loss differs, and the largest difference of a weight."""
    shared = sorted(set(found["losses"]) & set(with_["losses"]))
    parted = [step for step in shared if found["losses"][step] != with_["losses"][step]]
    gaps = [
        (weight.double() - with_["weights"][name].double()).abs().max().item()
        for name, weight in found["weights"].items()
    ]
    return {
        "same_bits": all(torch.equal(w, with_["weights"][n]) for n, w in found["weights"].items()),
        "first_step_whose_loss_differs": parted[0] if parted else None,
        "largest_weight_difference": max(gaps),
        "last_loss": found["losses"][shared[-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, help="a folder to keep (default: a temporary one)")
    parser.add_argument("--out", help="JSON of the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = (args.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "base").is_dir():
            made = ["--num-train", "1200", "--num-test", "20", "--base", str(work / "base")]
            voco(["gridworld", str(work / "set"), "--level", "study", *made], work)
        runs: dict[str, dict[str, Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name, case in CASES.items():
            runs[name] = train(name, case, work, args.steps)
            against = case.get("as", "first")
            if name != against:
                rows[name] = {"against": against, **compared(runs[name], runs[against])}
                row = rows[name]
                told = "the same bits" if row["same_bits"] else (
                    f"parts at step {row['first_step_whose_loss_differs']}, weights up to "
                    f"{row['largest_weight_difference']:.1e} apart"
                )  # fmt: skip
                print(f"{name:40} against {against:12} {told}", flush=True)
        if args.out:
            result = {"steps": args.steps, "rows": rows, "environment": environment("cpu")}
            atomic_write_text(args.out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
