"""A video streamed into a session, of 8 to 1,024 frames and more: seconds and memory a frame, and how often a
frame that is shown once is found. JSON on stdout.

    python benchmarks/video_needle.py --frames 8,64,256,1024 --budget none,64 --out needle.json
    python benchmarks/video_needle.py --model runs/video --data runs/needle --max-videos 50

Without ``--model`` a tiny VLM of random weights (4 layers, width 128, 16 vision tokens and 2 VoCo tokens a
frame) shows what is measured without training; its answers mean nothing and are not scored. With ``--model``
and ``--data`` (a folder of LLaVA rows, as ``voco gridworld`` writes a needle set: the frames of a video under
"image", one of which answers) each question is asked alone, and accuracy is by exact match, per number of
frames and question type. Each point of memory runs in a process of its own, so that its peak is its own: what
the stream takes on top of what the process held after its first eight frames.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WARM, SIDE = 8, 64
_TIME = re.compile(r"<(\d+(?:\.\d+)?)s>\s*$")


def load(source: str | None) -> tuple[Any, Any]:
    """The model and processor that are measured."""
    import voco_plugin as vp

    if source is not None:
        return vp.load(source)
    import torch

    from voco_plugin.gridworld.tiny_vlm import build_tiny_vlm

    torch.manual_seed(0)
    model, processor = build_tiny_vlm(image_size=SIDE, patch_size=16)
    return vp.attach(model, vp.VoCoConfig(num_tokens=2), processor=processor).eval(), processor


def stream(frames: int, first: int = 0) -> Iterator[Any]:
    """``frames`` frames of random cells, one a second; made as they are asked for."""
    import numpy as np
    from PIL import Image

    from voco_plugin.video.frames import Frame

    for number in range(first, first + frames):
        cells = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        yield Frame(Image.fromarray(cells.repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)), float(number), number)


def point(
    source: str | None, frames: int, budget: str | None, policy: str | None, times: bool
) -> dict[str, Any]:
    """One stream in this process: seconds a frame, peak bytes, a question at its end."""
    from voco_plugin import VoCoSession

    model, processor = load(source)
    options = {"budget": budget, "policy": policy, "time_text": times}
    warm = VoCoSession(model, processor).watch(**options)
    for frame in stream(WARM):
        warm.feed(frame)
    warm.ask("Which?", max_new_tokens=1)
    session = VoCoSession(model, processor)
    watching = session.watch(**options)
    before = _status("VmRSS")
    _reset_peak()
    seconds: list[float] = []
    for frame in stream(frames):
        start = time.perf_counter()
        watching.feed(frame)
        seconds.append(time.perf_counter() - start)
    streamed = _status("VmHWM") - before
    half = len(seconds) // 2
    start = time.perf_counter()
    session.ask("Which?", max_new_tokens=1)
    first_question = time.perf_counter() - start
    start = time.perf_counter()
    session.ask("Which?", max_new_tokens=1)
    report = watching.report()
    return {
        "frames": frames, "budget": budget, "policy": report["policy"], "kept": report["kept"],
        "seconds_a_frame": sum(seconds) / frames,
        "seconds_a_frame_first_half": sum(seconds[:half]) / half,
        "seconds_a_frame_second_half": sum(seconds[half:]) / (frames - half),
        "peak_bytes_streaming": streamed, "peak_bytes_with_questions": _status("VmHWM") - before,
        "kept_bytes": report["nbytes"], "kept_bytes_a_frame": report["nbytes"] / frames,
        "voco_tokens": report["voco_tokens"], "largest_gap_seconds": report["largest_gap"],
        "first_question_seconds": first_question, "question_seconds": time.perf_counter() - start,
    }  # fmt: skip


def accuracy(model: Any, processor: Any, rows: list[dict[str, Any]], folder: Path, options: dict) -> dict:
    """Exact matches by number of frames, then by question type, as ``[right, asked]``.

    A picture that many videos show is compressed once.
    """
    from PIL import Image

    from voco_plugin import VoCoSession
    from voco_plugin.evaluation.metrics import exact
    from voco_plugin.inference.answering import compress_images

    blocks: dict[str, Any] = {}
    found: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        names = row["image"]
        shown, _, question = row["conversations"][0]["value"].rpartition("<image>")
        told = [_TIME.search(piece) for piece in shown.split("<image>")] + [_TIME.search(shown)]
        timed = [m for m in told if m is not None]
        new = [n for n in dict.fromkeys(names) if n not in blocks]
        pictures = (Image.open(folder / "images" / n).convert("RGB") for n in new)
        blocks.update(zip(new, compress_images(model, processor, pictures), strict=True))
        watching = VoCoSession(model, processor).watch(time_text=bool(timed), **options)
        for number, name in enumerate(names):
            watching.add(blocks[name], float(told[number][1]) if timed else float(number))
        turns = row["conversations"]
        asked = [question.strip(), *(t["value"] for t in turns[2::2])]
        types = row.get("types") or ["question"] * len(asked)
        for text, answered, kind in zip(asked, turns[1::2], types, strict=True):
            answer = watching.ask(text, remember=False, max_new_tokens=8)
            score = found.setdefault(str(len(names)), {}).setdefault(kind, [0, 0])
            score[0] += exact(answer, answered["value"])
            score[1] += 1
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """What a frame takes, and where it was measured how often the needle is found, against frames."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    budgets = list(dict.fromkeys(point["budget"] for point in found["points"]))
    named = {budget: "every frame kept" if budget is None else f"budget {budget}" for budget in budgets}
    panels = [
        (lambda p: 1000 * p["seconds_a_frame"], "ms a frame"),
        (lambda p: p["peak_bytes_with_questions"] / p["frames"] / 2**10, "KiB a frame, peak with questions"),
    ]
    wide = 2 + ("accuracy" in found)
    figure, grid = plt.subplots(1, wide, figsize=(4.2 * wide, 3.6), layout="constrained")
    for axes, (value, label) in zip(grid, panels, strict=False):
        for budget, name in named.items():
            points = [p for p in found["points"] if p["budget"] == budget]
            axes.plot(
                [p["frames"] for p in points], [value(p) for p in points], "-o", markersize=4, label=name
            )
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    grid[0].legend(frameon=False, fontsize=8)
    if "accuracy" in found:
        axes, chance = grid[-1], {"needle": 20, "needle_cell": 25, "needle_half": 50}
        for (budget, scores), style in zip(found["accuracy"].items(), ("-o", ":o"), strict=False):
            kinds = sorted({kind for by_type in scores.values() for kind in by_type})
            for kind, colour in zip(kinds, ("tab:green", "tab:blue", "tab:orange"), strict=False):
                at = sorted(map(int, scores))
                pairs = [scores[str(frames)].get(kind, [0, 0]) for frames in at]
                name = named[None] if budget == "none" else f"budget {budget}"
                shares = [100 * right / max(asked, 1) for right, asked in pairs]
                axes.plot(at, shares, style, markersize=4, label=f"{kind}, {name}", color=colour)
                if budget == "none" and kind in chance:
                    axes.axhline(chance[kind], color=colour, linewidth=0.7, alpha=0.5)
        axes.set_ylim(0, 105)
        axes.set_ylabel("exact match, % (thin: chance)")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in grid:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("frames")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", default="8,64,256,1024")
    parser.add_argument("--budget", default="none,64", help="blocks or bytes; none keeps every frame")
    parser.add_argument("--policy", help="what goes beyond a budget (uniform)")
    parser.add_argument("--time-text", action="store_true")
    parser.add_argument("--model", help="a VoCo checkpoint (default: a tiny random model)")
    parser.add_argument("--data", type=Path, help="a folder with test.json and images/: accuracy")
    parser.add_argument("--max-videos", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG of it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        frames, budget = int(args.child[0]), None if args.child[1] == "none" else args.child[1]
        policy = args.policy if budget is not None else None
        print(json.dumps(point(args.model, frames, budget, policy, args.time_text)))
        return {}
    if args.data and not args.model:
        parser.error("--data needs --model: random weights answer nothing")
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    points = []
    for budget in args.budget.split(","):
        for frames in args.frames.split(","):
            child = [*(argv if argv is not None else sys.argv[1:]), "--child", frames, budget]
            done = subprocess.run(
                [sys.executable, __file__, *child], stdout=subprocess.PIPE, text=True, env=env, check=True
            )
            points.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(points[-1]), file=sys.stderr)
    words = argv if argv is not None else sys.argv[1:]
    found: dict[str, Any] = {"command": " ".join(["python benchmarks/video_needle.py", *words])}
    found |= {"model": args.model or "tiny, random weights", "time_text": args.time_text, "points": points}
    if args.data:
        model, processor = load(args.model)
        rows = json.loads((args.data / "test.json").read_text(encoding="utf-8"))[: args.max_videos]
        found["accuracy"] = {
            budget: accuracy(
                model, processor, rows, args.data,
                {} if budget == "none" else {"budget": budget, "policy": args.policy},
            )
            for budget in args.budget.split(",")
        }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        draw(found, args.plot)
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
