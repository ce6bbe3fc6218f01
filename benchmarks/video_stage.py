"""The paper's video stage (Sec. 3.4) on gridworld videos: does continued training teach a model to read time?

    voco gridworld runs/videos --video --frames 8,16 --num-train 12000 --model runs/videos_init
    voco train gridworld_study_base --model_name_or_path runs/videos_init --output_dir runs/videos_base
    voco train gridworld_study_voco --model_name_or_path runs/videos_base --voco.num_tokens 2 \\
        --voco.token_init pooled --max_steps 1600 --output_dir runs/videos_image
    voco gridworld runs/videos_long --video --frames 8,16,32,64,128 --num-train 1500 \\
        --num-test 250 --seed 1 --no-hf
    python benchmarks/video_stage.py --seeds 0,1,2 --out docs/results/video

The image model answers the test videos as it is, then once per seed after `voco train gridworld_video`, each
time with every frame, with the middle frame alone and with the frames shuffled, from cached blocks, and with
no frame at all. What is trained or answered already (in --work) is not done again. Into --out go
`results.json`, `table.md`, `types.png` and `frames.png`. Options after `--` are overrides of the recipe.

Intervals: 2.5 and 97.5 percentiles of a bootstrap over whole videos and over seeds; differences are paired.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ORDERS = ("all", "shuffled", "single")
SHOWN = {
    "all": "every frame",
    "shuffled": "frames shuffled",
    "single": "middle frame alone",
    "blind": "no frame",
}
COLOURS = {"all": "tab:green", "shuffled": "tab:orange", "single": "tab:blue", "blind": "tab:gray"}


def run(*words: str) -> None:
    """A `voco` command; its output goes on to ours.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, "-m", "voco_plugin", *words])
    if done.returncode:
        raise SystemExit(f"voco {' '.join(words)} ended with {done.returncode}")


def answers(model: Path, test: Path, out: Path) -> dict[str, Any]:
    """What `voco eval` says of a model, in each order of the frames."""
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        run(
            "eval", str(model), "--data", str(test / "test.json"), "--image-folder", str(test / "images"),
            "--frames", ",".join(ORDERS), "--mode", "voco", "--mode", "blind", "--max-new-tokens", "2",
            "--out", str(out),
        )  # fmt: skip
    return json.loads(out.read_text(encoding="utf-8"))


def right(found: dict[str, Any], order: str) -> np.ndarray:
    """``(Q,)``, 1 where the answer is right."""
    name = {"all": "voco", "blind": "blind"}.get(order, f"voco frames={order}")
    return np.frombuffer(found["scores"][name]["correct"].encode(), dtype=np.uint8) - ord("0")


def collect(before: dict[str, Any], after: dict[int, dict[str, Any]], test: Path) -> dict[str, Any]:
    """Accuracies and paired differences, over all questions that need order, by type and by number of frames.

    Args:
        before: the image model's answers, as `voco eval --out` writes them.
        after: seed → the answers after continued training.
        test: the folder of the test videos.

    Raises:
        ValueError: the answers are not to the same questions.
    """
    from voco_plugin.evaluation.intervals import Resampler, interval
    from voco_plugin.gridworld.video_questions import ORDER_TYPES

    for found in after.values():
        if (found["rows"], found["types"]) != (before["rows"], before["types"]):
            raise ValueError("the models answered other questions; remove the old answers from --work")
    rows, types = np.asarray(before["rows"]), np.asarray(before["types"])
    videos = json.loads((test / "test.json").read_text(encoding="utf-8"))
    frames = np.asarray([len(videos[row]["image"]) for row in before["rows"]])
    right_answers = {
        "before": {order: right(before, order)[None] for order in SHOWN},
        "after": {order: np.stack([right(found, order) for found in after.values()]) for order in SHOWN},
    }
    ordered = np.isin(types, ORDER_TYPES)
    chosen = {"order": ordered, **{str(kind): types == kind for kind in np.unique(types)}}
    chosen |= {f"{number} frames": ordered & (frames == number) for number in np.unique(frames)}
    chosen |= {f"count, {n} frames": (types == "count") & (frames == n) for n in np.unique(frames)}
    result: dict[str, Any] = {}
    for name, keep in chosen.items():
        if not keep.any():
            continue
        draws = Resampler(int(keep.sum()), groups=rows[keep])
        entry: dict[str, Any] = {"questions": int(keep.sum())}
        for stage, orders in right_answers.items():
            drawn = {order: draws.means(values[:, keep], stage) for order, values in orders.items()}
            entry[stage] = {
                order: {
                    "accuracy": float(values[:, keep].mean()), "interval": interval(drawn[order]),
                    "per_seed": [float(v) for v in values[:, keep].mean(axis=1)],
                }
                for order, values in orders.items()
            }  # fmt: skip
            for other in ("shuffled", "single", "blind"):
                difference = orders["all"][:, keep].mean() - orders[other][:, keep].mean()
                entry[stage][f"all - {other}"] = {
                    "difference": float(difference), "interval": interval(drawn["all"] - drawn[other])
                }  # fmt: skip
        result[name] = entry
    guessers = {}
    meta = json.loads((test / "meta.json").read_text(encoding="utf-8"))
    for order, key in (("blind", "blind"), ("single", "single_frame"), ("shuffled", "shuffled")):
        guessers[order] = meta[f"{key}_accuracy"]
    return {"seeds": list(after), "figures": result, "guessers": guessers}


def markdown(result: dict[str, Any]) -> str:
    """The table of :func:`collect`'s figures, in per cent."""
    lines = [
        "| | questions | " + " | ".join(f"{s}: {SHOWN[o]}" for s in ("before", "after") for o in SHOWN) + " |"
    ]
    lines.append("|---" * (2 + 2 * len(SHOWN)) + "|")
    for name, entry in result["figures"].items():
        cells = []
        for stage in ("before", "after"):
            for order in SHOWN:
                found = entry[stage][order]
                low, high = (100 * value for value in found["interval"])
                cells.append(f"{100 * found['accuracy']:.1f} [{low:.1f}, {high:.1f}]")
        lines.append(f"| {name} | {entry['questions']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], out: Path, trained_on: list[int]) -> None:
    """`types.png` and `frames.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = result["figures"]
    types = ["order", *(name for name in figures if " " not in name and name != "order")]
    figure, panels = plt.subplots(2, 1, figsize=(9, 6.4), layout="constrained", sharex=True, sharey=True)
    for axes, stage in zip(panels, ("before", "after"), strict=True):
        for number, order in enumerate(SHOWN):
            at = np.arange(len(types)) - 0.4 + 0.2 * (number + 0.5)
            entries = [figures[name][stage][order] for name in types]
            heights = [100 * e["accuracy"] for e in entries]
            spread = np.abs(100 * np.asarray([e["interval"] for e in entries]).T - heights)
            axes.bar(at, heights, 0.18, yerr=spread, label=SHOWN[order], color=COLOURS[order],
                     error_kw={"elinewidth": 0.8})  # fmt: skip
        for at, name in enumerate(types):
            for order in ("shuffled", "single"):
                if name in result["guessers"][order]:
                    height = 100 * result["guessers"][order][name]
                    axes.plot([at - 0.42, at + 0.42], [height] * 2, ":", color=COLOURS[order], linewidth=1.6)
        axes.set_ylim(0, 105)
        axes.set_ylabel("exact match, %")
        axes.set_title(f"{stage} continued training on videos", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(range(len(types)), ["all that need\norder", *types[1:]])
    panels[0].legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    panels[1].set_xlabel(
        "dotted: the best guesser who sees perfectly, one frame or all in no order", fontsize=8
    )
    figure.savefig(out / "types.png", dpi=130, bbox_inches="tight")
    plt.close(figure)

    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
    for axes, (prefix, title) in zip(
        panels, (("", "questions that need order"), ("count, ", "count")), strict=True
    ):
        found = {int(n.removeprefix(prefix).split()[0]): e for n, e in figures.items()
                 if n.endswith(" frames") and n.startswith("count") == bool(prefix)}  # fmt: skip
        lengths = sorted(found)
        for stage, style in (("after", "-o"), ("before", ":o")):
            for order in SHOWN if stage == "after" else ("all",):
                entries = [found[number][stage][order] for number in lengths]
                values = [100 * e["accuracy"] for e in entries]
                label = SHOWN[order] if stage == "after" else "before: every frame"
                colour = COLOURS[order] if stage == "after" else "0.2"
                axes.plot(lengths, values, style, markersize=4, label=label, color=colour)
                low, high = (100 * np.asarray([e["interval"] for e in entries])).T
                axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axvspan(min(trained_on), max(trained_on), color="0.92", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(number) for number in lengths])
        axes.set_xlabel("frames of the video (shaded: lengths in training)")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 105)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exact match, %")
    panels[1].legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(out / "frames.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", type=Path, default=Path("runs/videos_image"), help="the image VoCo model")
    parser.add_argument("--train", type=Path, default=Path("runs/videos"), help="training videos")
    parser.add_argument("--test", type=Path, default=Path("runs/videos_long"), help="test videos")
    parser.add_argument("--recipe", default="gridworld_video")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("runs/video_stage"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/video"))
    args = parser.parse_args(words[:cut])
    overrides = words[cut + 1 :]
    from voco_plugin.benchmark.result_file import environment

    before = answers(args.image, args.test, args.work / "before.json")
    after = {}
    for seed in map(int, args.seeds.split(",")):
        folder = args.work / f"seed{seed}"
        if not (folder / "config.json").is_file():
            run(
                "train", args.recipe, "--seed", str(seed), "--model_name_or_path", str(args.image),
                "--dataset_name", str(args.train / "hf"), "--output_dir", str(folder), *overrides,
            )  # fmt: skip
        after[seed] = answers(folder, args.test, args.work / f"seed{seed}.json")
    result = {
        "command": " ".join(["python benchmarks/video_stage.py", *words]), "environment": environment("cpu"),
        "trained_on": json.loads((args.train / "meta.json").read_text())["settings"],
        "tested_on": json.loads((args.test / "meta.json").read_text())["settings"],
        **collect(before, after, args.test),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "table.md").write_text(markdown(result), encoding="utf-8")
    draw(result, args.out, result["trained_on"]["num_frames"])
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()
