"""One gridworld recipe, three encoder libraries × three LLM classes, by changing two names: does each learn?

    python benchmarks/gridworld_backbones.py --work runs/backbones --out docs/results/backbones_grid.json

Writes the data, tiny encoders (trained on patches) and tiny LLMs (random weights) into WORK, then runs, cell
by cell, `voco train gridworld_compose --model.encoder … --model.llm …` and `voco eval --mode base --mode
blind`, as a user types them, in processes of their own with one thread. A cell whose result is in OUT already
is not run again; with --jobs 2 two run at a time. OUT gets the JSON, and a Markdown table beside it (.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ENCODERS = ("transformers_clip", "timm_vit", "open_clip_vit")
LLMS = ("llama", "qwen3", "gemma3")
PACKAGES = ("torch", "transformers", "trl", "timm", "open_clip_torch")


def voco(*words: object, threads: int) -> str:
    """One `voco` command in its own process; its standard output."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "voco_plugin", *map(str, words)], capture_output=True, text=True, env=env
    )
    if done.returncode:
        sys.exit(f"voco {' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def cell(args: argparse.Namespace, encoder: str, llm: str) -> dict:
    """Train one pair and evaluate it with and without the image."""
    folder = args.work / f"{encoder}-{llm}"
    data, parts = args.work / "gridworld", args.work / "parts"
    train = ["train", "gridworld_compose", "--model.encoder", parts / encoder, "--model.llm", parts / llm]
    train += ["--dataset_name", data / "train.json", "--image_folder", data / "images"]
    train += ["--output_dir", folder, "--max_steps", args.steps, *args.override]
    start = time.perf_counter()
    voco(*train, threads=args.threads)
    seconds = time.perf_counter() - start
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    words = ["eval", folder, "--data", data / "test.json", "--image-folder", data / "images", "--json"]
    scores = json.loads(voco(*words, "--mode", "base", "--mode", "blind", threads=args.threads))["scores"]
    config = json.loads((folder / "config.json").read_text())
    return {
        "encoder": encoder, "llm": llm, "class": config["architectures"][0], "steps": args.steps,
        "train_seconds": seconds, "loss_first": losses[0], "loss_last": losses[-1],
        "accuracy": scores["base"]["accuracy"], "by_type": scores["base"]["by_type"],
        "accuracy_without_image": scores["blind"]["accuracy"], "override": args.override,
    }  # fmt: skip


def learned(run: dict, guesser: float) -> bool:
    """Whether the loss fell and the answers beat the best guesser who sees no image, and the model blind."""
    above = run["accuracy"] > max(guesser, run["accuracy_without_image"])
    return run["loss_last"] < run["loss_first"] and above


def table(result: dict) -> str:
    """Markdown: a row per pair."""
    guesser = result["guesser_accuracy"]
    lines = [
        f"Best guesser without the image: {100 * guesser:.1f} %. {result['questions']} held-out questions.",
        "",
        "| encoder | LLM | class | loss, first → last log | accuracy % | without image % | s | learned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in sorted(result["runs"], key=lambda r: (ENCODERS.index(r["encoder"]), LLMS.index(r["llm"]))):
        lines.append(
            f"| {run['encoder']} | {run['llm']} | {run['class']} | {run['loss_first']:.2f} → "
            f"{run['loss_last']:.2f} | {100 * run['accuracy']:.1f} | "
            f"{100 * run['accuracy_without_image']:.1f} | {run['train_seconds']:.0f} | "
            f"{'yes' if learned(run, guesser) else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def prepare(args: argparse.Namespace) -> dict:
    """Data and parts, once; what the data says of itself."""
    data, parts = args.work / "gridworld", args.work / "parts"
    made = all((parts / name / "config.json").is_file() for name in (*ENCODERS, *LLMS))
    if not (made and (data / "meta.json").is_file()):
        words = ["gridworld", data, "--num-train", args.num_train, "--num-test", args.num_test]
        words += ["--parts", parts, "--tower-steps", args.tower_steps, "--overwrite", "--json"]
        written = json.loads(voco(*words, threads=args.threads))
        (parts / "figures.json").write_text(json.dumps(next(iter(written["parts"].values())), indent=1))
    meta = json.loads((data / "meta.json").read_text())
    figures = json.loads((parts / "figures.json").read_text()) if (parts / "figures.json").is_file() else {}
    questions = sum(len(row["types"]) for row in json.loads((data / "test.json").read_text()))
    return {"guesser_accuracy": meta["blind_accuracy"]["all"], "questions": questions, "encoders": figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/backbones"), help="data and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; the table goes beside it")
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--llms", nargs="+", choices=LLMS, default=list(LLMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tower-steps", type=int, default=600)
    parser.add_argument("--num-train", type=int, default=6000)
    parser.add_argument("--num-test", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--override", nargs=argparse.REMAINDER, default=[], help="more keys of the recipe")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    result |= prepare(args)
    result["command"] = "python benchmarks/gridworld_backbones.py " + " ".join(sys.argv[1:])
    result["versions"] = {name: version(name) for name in PACKAGES}
    result["machine"] = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    done = {(r["encoder"], r["llm"]) for r in result["runs"]}
    todo = [(e, m) for e in args.encoders for m in args.llms if (e, m) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        for made in pool.map(lambda pair: cell(args, *pair), todo):
            result["runs"].append(made)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
            args.out.with_suffix(".md").write_text(table(result))
            print(f"{made['encoder']} + {made['llm']}: {100 * made['accuracy']:.1f} %", flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
