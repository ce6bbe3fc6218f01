"""VoCo on gridworld over K and seeds, beside its base, lower bound and blind: one JSON file, then a table.

    python benchmarks/gridworld_study.py --base runs/gridworld_base --data runs/gridworld --out
    docs/results/gridworld.json

Each run is `voco train gridworld_voco` and `voco eval`, as a user types them, in a process of its own with
one thread; `--jobs 2` runs two at a time. A run whose result is in OUT already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def voco(*words: object, threads: int) -> str:
    """One `voco` command in its own process; its standard output."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "voco_plugin", *map(str, words)], capture_output=True, text=True, env=env
    )
    if done.returncode:
        sys.exit(f"voco {' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def scores(model: Path, data: Path, modes: list[str], k: int | None, threads: int) -> dict:
    """Accuracy in all and by question type, per mode."""
    words = ["eval", model, "--data", data / "test.json", "--image-folder", data / "images", "--json"]
    words += [w for mode in modes for w in ("--mode", mode)]
    words += ["--num-tokens", k] if k is not None else []
    found = json.loads(voco(*words, threads=threads))["scores"]
    return {mode: {"accuracy": s["accuracy"], "by_type": s["by_type"]} for mode, s in found.items()}


def run(args: argparse.Namespace, k: int, seed: int) -> dict:
    """Train and evaluate one VoCo model."""
    folder = args.work / f"voco_k{k}_s{seed}"
    train = ["train", "gridworld_voco", "--model_name_or_path", args.base, "--output_dir", folder]
    train += ["--dataset_name", args.data / "train.json", "--image_folder", args.data / "images"]
    train += ["--voco.num_tokens", k, "--seed", seed, *args.override]
    start = time.perf_counter()
    voco(*train, threads=args.threads)
    seconds = time.perf_counter() - start
    return {
        "num_tokens": k, "seed": seed, "train_seconds": seconds, "override": args.override,
        **scores(folder, args.data, ["voco"], None, args.threads)["voco"],
    }  # fmt: skip


def table(result: dict) -> str:
    """Markdown: a row per way; accuracy per seed, raw ratio and retention (paper, Sec. 4.2), by type."""
    bounds, runs = result["bounds"], result["runs"]
    upper = bounds["base"]["accuracy"]
    kinds = sorted(bounds["base"]["by_type"])
    lines = [f"| | per seed % | mean % | raw ratio % | retention % | {' | '.join(kinds)} |"]
    lines.append("|" + "---|" * (5 + len(kinds)))

    def row(name: str, values: list[dict], lower: float | None) -> None:
        mean = statistics.mean(v["accuracy"] for v in values)
        kept = "–" if lower is None else f"{100 * (mean - lower) / (upper - lower):.1f}"
        seeds = ", ".join(f"{100 * v['accuracy']:.1f}" for v in values)
        types = " | ".join(f"{100 * statistics.mean(v['by_type'][k] for v in values):.0f}" for k in kinds)
        lines.append(f"| {name} | {seeds} | {100 * mean:.1f} | {100 * mean / upper:.1f} | {kept} | {types} |")

    row("base, all vision tokens", [bounds["base"]], None)
    for k in sorted({r["num_tokens"] for r in runs}):
        lower = bounds[f"lower_k{k}"]
        of_k = sorted((r for r in runs if r["num_tokens"] == k), key=lambda r: r["seed"])
        row(f"VoCo, K = {k}", of_k, lower["accuracy"])
        row(f"lower bound, K = {k}", [lower], lower["accuracy"])
    row("blind: base, no image", [bounds["blind"]], None)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="the plain VLM")
    parser.add_argument("--data", type=Path, required=True, help="the gridworld folder")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where checkpoints go")
    parser.add_argument("--num-tokens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--override", nargs=argparse.REMAINDER, default=[], help="more keys of the recipe")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    result["command"] = "python benchmarks/gridworld_study.py " + " ".join(sys.argv[1:])
    result["versions"] = {name: version(name) for name in PACKAGES}
    result["machine"] = (
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"
    )
    if "bounds" not in result:
        result["bounds"] = scores(args.base, args.data, ["base", "blind"], None, args.threads)
        result["bounds"] |= {
            f"lower_k{k}": scores(args.base, args.data, ["lower"], k, args.threads)["lower"]
            for k in args.num_tokens
        }

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")

    save()
    done = {(r["num_tokens"], r["seed"]) for r in result["runs"]}
    todo = [(k, s) for s in args.seeds for k in args.num_tokens if (k, s) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        for made in pool.map(lambda pair: run(args, *pair), todo):
            result["runs"].append(made)
            save()
            print(f"K={made['num_tokens']} seed={made['seed']}: {100 * made['accuracy']:.1f} %", flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
