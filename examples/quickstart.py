"""From images to answers without images, in minutes on a CPU: what `make quickstart` runs.

    python examples/quickstart.py --out runs/quickstart

Each step is the command a user would type (it is printed first), or a call of the public API:

    1  voco gridworld     a small visual question answering set, and the plain VLM that ships with the package
    2  voco train         VoCo tokens tuned into that VLM: LoRA, vision tower frozen
    3  voco eval          base, VoCo, lower bound and blind on the same held-out questions
    4  voco compress      held-out images → one cache file; voco generate answers from it, without the images
    5  the public API     cached answers against single-pass answers; bytes; time
    6  pictures and report.md
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see docs/decisions.md: spinning threads on shared cores

from PIL import Image

import voco_plugin as vp
from voco_plugin.benchmark import stage_two_times
from voco_plugin.cli import main as voco
from voco_plugin.cli.output import emit, human_bytes, note, table
from voco_plugin.evaluation.metrics import agreement, raw_ratio, retention
from voco_plugin.evaluation.reporting.charts import draw_bars, draw_losses, read_losses
from voco_plugin.evaluation.reporting.report import Report
from voco_plugin.evaluation.reporting.sheet import SheetEntry, draw_sheet

ROWS = {
    "base": "base VLM, all 16 vision tokens",
    "voco": "VoCo",
    "lower": "lower bound",
    "blind": "base VLM, no image",
}


def run(*arguments: object, capture: bool = False) -> str:
    """One `voco` command, as a user types it; stops the quickstart where it fails."""
    words = [str(a) for a in arguments]
    note(f"\n$ voco {shlex.join(words)}")
    buffer = io.StringIO()
    with contextlib.redirect_stdout(buffer) if capture else contextlib.nullcontext():
        status = voco(words)
    if status:
        sys.exit(status)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="runs/quickstart", help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--base", help="another base VLM than the shipped one")
    parser.add_argument("--num-train", type=int, default=4000, help="training images (default: %(default)s)")
    parser.add_argument("--num-test", type=int, default=200, help="held-out images (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, help="training steps (default: the recipe's)")
    parser.add_argument("--num-tokens", type=int, default=1, help="K, VoCo tokens an image (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: 0)")
    args = parser.parse_args()
    started = time.perf_counter()
    out = Path(args.out)
    shutil.rmtree(out, ignore_errors=True) if (out / "report.md").is_file() else None
    data, tuned = out / "gridworld", out / "voco"

    # 1  real images in the real formats, and the VLM to start from
    made = ["gridworld", data, "--num-train", args.num_train, "--num-test", args.num_test, "--overwrite"]
    run(*made, *([] if args.base else ["--base", out / "base"]))
    base = Path(args.base) if args.base else out / "base"
    guesser = json.loads((data / "meta.json").read_text())["blind_accuracy"]

    # 2  tune VoCo into it
    train_started = time.perf_counter()
    run(
        "train", "gridworld_voco", "--model_name_or_path", base, "--output_dir", tuned,
        "--dataset_name", data / "train.json", "--image_folder", data / "images",
        "--voco.num_tokens", args.num_tokens, "--seed", args.seed, "--overwrite", "true",
        *([] if args.max_steps is None else ["--max_steps", args.max_steps, "--logging_steps", 1]),
    )  # fmt: skip
    train_seconds = time.perf_counter() - train_started

    # 3  the same held-out questions for everyone
    held_out = ["--data", data / "test.json", "--image-folder", data / "images", "--batch-size", 128]
    run("eval", tuned, *held_out, "--mode", "voco", "--out", out / "voco.json", capture=True)
    plain = ["--mode", "base", "--mode", "lower", "--mode", "blind", "--num-tokens", args.num_tokens]
    run("eval", base, *held_out, *plain, "--out", out / "base.json", capture=True)
    scores = {**read(out / "base.json")["scores"], **read(out / "voco.json")["scores"]}
    facts = {
        "images": args.num_test, "questions": read(out / "voco.json")["questions"], "steps": steps_of(tuned),
        "train_seconds": train_seconds, "num_tokens": args.num_tokens, "guesser": guesser["all"],
    }  # fmt: skip
    rows = result_rows(scores, guesser, args.num_tokens)
    header = ("", "accuracy %", "raw ratio %", "retention %")
    emit(table(rows, header))

    # 4  compress, then answer from the file alone
    images = sorted((data / "images" / "test").iterdir())
    cache_file = out / "held_out.safetensors"
    compressed = json.loads(
        run(
            "compress",
            tuned,
            data / "images" / "test",
            "--out",
            cache_file,
            "--batch-size",
            32,
            "--json",
            capture=True,
        )
    )
    conversations = read(data / "test.json")
    entries = answer_from_cache(tuned, cache_file, conversations[:6], images, out)

    # 5  what the cache costs, and that it answers as the single pass does
    checks = compare(tuned, base, args.num_tokens, cache_file, conversations, images)
    facts |= {"compressed": compressed, **checks}
    emit(
        f"\ncached answers equal to single-pass answers: {checks['equal']} of {checks['compared']}; "
        f"largest logit difference {checks['max_logit_difference']:.1e}"
    )
    emit(
        f"cache {human_bytes(compressed['cache_bytes'])}, all vision tokens "
        f"{human_bytes(compressed['full_kv_bytes'])}"
    )
    for batch, ratios in checks["ratios"].items():
        told = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in ratios.items())
        emit(f"stage 2 at batch {batch}: VoCo takes {told}")

    # 6  pictures and the report
    pictures = draw(out, tuned, base, data, scores, entries, images)
    facts["seconds"] = time.perf_counter() - started
    (out / "results.json").write_text(json.dumps({"scores": strip(scores), **facts}, indent=2) + "\n")
    write_report(out, header, rows, facts, pictures)
    emit(f"\n{facts['seconds'] / 60:.1f} minutes; report and pictures: {out / 'report.md'}")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def steps_of(folder: Path) -> int:
    return read(folder / "trainer_state.json")["global_step"]


def strip(scores: dict) -> dict:
    return {mode: {k: v for k, v in entry.items() if k != "answers"} for mode, entry in scores.items()}


def result_rows(scores: dict, guesser: dict, num_tokens: int) -> list[list]:
    """Accuracy, raw ratio and retention of each way, in per cent."""
    upper, lower = scores["base"]["accuracy"], scores["lower"]["accuracy"]
    accuracy = {mode: scores[mode]["accuracy"] for mode in ROWS} | {"guesser": guesser["all"]}
    names = {**ROWS, "guesser": "best guesser without image", "voco": f"VoCo, {num_tokens} token(s) an image"}
    rows: list[list] = []
    for mode, value in accuracy.items():
        kept = retention(value, lower, upper) if upper > lower else None
        ratio = 100 * raw_ratio(value, upper) if upper else None
        rows.append([names[mode], 100 * value, ratio, None if kept is None else 100 * kept])
    return rows


def answer_from_cache(
    tuned: Path, cache_file: Path, conversations: list, images: list[Path], out: Path
) -> list[SheetEntry]:
    """Every question of the first held-out images, answered from the cache file by `voco generate`."""
    entries = []
    for index, record in enumerate(conversations):
        turns = record["conversations"]
        asked = [t["value"].replace("<image>\n", "") for t in turns if t["from"] == "human"]
        right = [t["value"] for t in turns if t["from"] == "gpt"]
        asked = [q for q, kind in zip(asked, record["types"], strict=True) if kind != "describe"]
        questions = out / "questions.txt"
        questions.write_text("\n".join(asked) + "\n", encoding="utf-8")
        command = ["generate", tuned, "--cache", cache_file, "--index", index, "--questions", questions]
        answers = json.loads(run(*command, "--max-new-tokens", 16, "--json", capture=True))
        rows = [(a["question"], a["answer"], r) for a, r in zip(answers, right, strict=False)]
        entries.append(SheetEntry(Image.open(images[index]), rows, images[index].name))
    return entries


def compare(
    tuned: Path, base: Path, num_tokens: int, cache_file: Path, conversations: list, images: list[Path]
) -> dict:
    """Cached against single-pass answers, and stage 2 against no cache and full caching."""
    model, processor = vp.load(str(tuned))
    cache = vp.VoCoCache.load(cache_file)
    chosen = list(range(min(24, len(images))))
    questions = [conversations[i]["conversations"][0]["value"].replace("<image>\n", "") for i in chosen]
    pictures = [Image.open(images[i]).convert("RGB") for i in chosen]
    found = agreement(model, processor, questions, [[p] for p in pictures], [cache[i] for i in chosen], 16)

    attached, processor = vp.load(str(base), voco=vp.VoCoConfig(num_tokens=num_tokens))
    plain = vp.detach(vp.load(str(base))[0])
    ratios = {}
    for batch in (1, 16):
        seconds = stage_two_times(plain, attached, processor, pictures[:batch], questions[:batch])
        ratios[batch] = {name: seconds["VoCo"] / seconds[name] for name in ("no cache", "full caching")}
    return {
        "equal": found.equal,
        "compared": found.total,
        "max_logit_difference": found.max_logit_difference,
        "ratios": ratios,
    }


def draw(
    out: Path,
    tuned: Path,
    base: Path,
    data: Path,
    scores: dict,
    entries: list[SheetEntry],
    images: list[Path],
) -> dict[str, Path]:
    """The four pictures."""
    pictures = {name: out / f"{name}.png" for name in ("mask", "losses", "accuracy", "answers")}
    run(
        "inspect",
        tuned,
        "--text",
        entries[0].rows[0][0],
        "--image",
        images[0],
        "--out",
        pictures["mask"],
        capture=True,
    )
    draw_losses({"VoCo tuning": read_losses(tuned)}, pictures["losses"], "VoCo tuned into the base VLM")
    kinds = sorted(scores["voco"]["by_type"])
    series = {
        name: [100 * scores[mode]["accuracy"], *(100 * scores[mode]["by_type"][kind] for kind in kinds)]
        for mode, name in (
            ("base", "base VLM"),
            ("voco", "VoCo"),
            ("lower", "lower bound"),
            ("blind", "no image"),
        )
    }
    draw_bars(["all", *kinds], series, pictures["accuracy"], title="held-out questions answered exactly")
    draw_sheet(
        entries, pictures["answers"], title="answers from the cache file, the images not opened (red: wrong)"
    )
    return pictures


def write_report(out: Path, header: tuple, rows: list, facts: dict, pictures: dict[str, Path]) -> None:
    """One page: what was done, the table, what the cache is worth, the pictures."""
    compressed, tokens = facts["compressed"], facts["num_tokens"]
    report = Report("VoCo on gridworld: answers from the cache")
    report.text(
        f"A plain VLM was tuned for {facts['steps']} steps ({facts['train_seconds'] / 60:.1f} minutes) to "
        f"compress each image "
        f"into {tokens} VoCo token(s). All accuracies are exact match on the same {facts['questions']} "
        f"questions about "
        f"{facts['images']} held-out images, each asked alone; the whole run took "
        f"{facts['seconds'] / 60:.1f} minutes."
    )
    report.table(header, rows)
    report.text("Raw ratio: x / base. Retention: (x − lower bound) / (base − lower bound).")
    report.picture(pictures["accuracy"], "accuracy by question type")
    report.heading("The cache")
    report.table(
        ("", ""),
        [
            (
                "answers from the cache equal to the single masked pass",
                f"{facts['equal']} of {facts['compared']}",
            ),
            ("largest logit difference", f"{facts['max_logit_difference']:.1e}"),
            ("cache file's keys and values", human_bytes(compressed["cache_bytes"])),
            ("all vision tokens' keys and values", human_bytes(compressed["full_kv_bytes"])),
            ("smaller by", f"{compressed['compression']:.0f} times"),
            ("compression speed", f"{compressed['images_per_second']:.0f} images/s"),
            *(
                (f"stage 2 time, batch {batch}, as a ratio to {name}", f"{ratio:.2f}")
                for batch, ratios in facts["ratios"].items()
                for name, ratio in ratios.items()
            ),
        ],
    )
    report.text(
        "Times are medians of alternating runs in one process, to the first answer token. An image is 16 "
        "tokens here, "
        "so there is little to save per question; at 576 tokens and up there is more."
    )
    report.picture(pictures["answers"], "held-out images, questions, answers from the cache")
    report.heading("Training")
    report.picture(pictures["losses"], "loss curve")
    report.heading("The mask of one sample")
    report.picture(pictures["mask"], "what each token sees")
    report.write(out / "report.md")


if __name__ == "__main__":
    main()
