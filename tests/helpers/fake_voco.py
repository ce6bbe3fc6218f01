"""In the place of `voco`, for tests of studies: `train` and `eval` that take no time.

What was called is appended to $FAKE_JOURNAL, a line each. A command that has $FAKE_FAIL among its words
fails; a training that has $FAKE_HANG saves its checkpoint and then waits until it is killed. An answer is
right by a hash of model and question, and the more often the larger K: the same command gives the same
answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    "device": "cpu", "device_name": "none", "threads": 1, "cores": 1, "python": "3",
    "versions": {"voco_plugin": "0"},
}  # fmt: skip
TYPES = ["colour", "count", "colour", "sum"]
QUESTIONS = 40


def note(line: str) -> None:
    with open(os.environ["FAKE_JOURNAL"], "a") as stream:
        stream.write(line + "\n")


def options(words: list[str]) -> dict[str, str]:
    found, words = {}, list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" in word:
            key, _, found[key] = word.partition("=")
        elif word.startswith("--"):
            found[word] = words.pop(0)
    return found


def train(words: list[str]) -> None:
    given = options(words)
    folder = Path(given["--output_dir"])
    steps = int(given.get("--max_steps", 4))
    resumed = max((int(f.name.split("-")[1]) for f in folder.glob("checkpoint-*")), default=0)
    if "--resume_from_checkpoint" not in given:
        resumed = 0
    note(f"train {folder.name} from {resumed}")
    halfway = folder / f"checkpoint-{steps // 2}"
    halfway.mkdir(parents=True, exist_ok=True)
    (halfway / "trainer_state.json").write_text("{}")
    (halfway / "optimizer.pt").write_text("")
    hang = os.environ.get("FAKE_HANG")
    if hang and hang in words:
        note(f"hangs {os.getpid()}")
        for _ in range(3000):  # a minute, should nobody come
            if os.path.exists(os.environ.get("FAKE_GO", "/nonexistent")):
                break
            time.sleep(0.02)
    (folder / "told.json").write_text(json.dumps(given))
    (folder / "train_results.json").write_text(
        json.dumps(
            {
                "train_runtime": 8.0 * (steps - resumed) / steps, "steps": steps, "resumed_at": resumed,
                "trained_parameters": 1000, "parameters": 5000, "environment": ENVIRONMENT,
            }
        )
    )  # fmt: skip


def evaluate(words: list[str]) -> None:
    given, model = options(words[1:]), Path(words[0])
    told = json.loads((model / "told.json").read_text()) if (model / "told.json").is_file() else {}
    trained_k = int(told.get("--voco.num_tokens", 1))
    mode = given["--mode"]
    limit = int(given.get("--limit", QUESTIONS))
    scores = {}
    for step in given.get("--steps", "").split(","):
        for k in given.get("--num-tokens", "").split(","):
            count = int(k or trained_k)
            share = {"single": 0.95, "base": 0.97, "lower": 0.2, "blind": 0.15}.get(
                mode, 0.3 + 0.1 * min(count, 5)
            )
            share -= 0.1 * bool(step)
            seed = f"{told.get('--seed')} {told.get('--learning_rate')} {mode} {count} {step}"
            right = [
                int(hashlib.sha256(f"{seed} {q}".encode()).digest()[0] / 256 < share) for q in range(limit)
            ]
            name = mode + (f" K={k}" if k else "") + (f" at {step}" if step else "")
            scores[name] = {
                "mode": mode, "num_tokens": None if mode in ("base", "blind") else count,
                "accuracy": sum(right) / limit, "by_type": {}, "counts": {}, "seconds": 0.5,
                "cache": {"bytes": 100.0 * count, "tokens": count, "vision_tokens": 16}
                if mode in ("voco", "lower") else None,
                "answers": ["x"] * limit, "correct": "".join(map(str, right)),
                **({"step": int(step)} if step else {}),
            }  # fmt: skip
    note(f"eval {Path(given['--out']).stem} {mode}")
    types = [TYPES[q % len(TYPES)] for q in range(limit)]
    found = {
        "scores": scores, "images": 10, "questions": limit, "types": types,
        "rows": [q // 4 for q in range(limit)], "environment": ENVIRONMENT,
        **({"turns": [q % 4 + 1 for q in range(limit)]} if "--turns" in words else {}),
    }  # fmt: skip
    target = Path(given["--out"])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found))


def main() -> None:
    words = sys.argv[1:]
    fail = os.environ.get("FAKE_FAIL")
    if fail and any(fail in word for word in words):
        note(f"{words[0]} fails")
        sys.stderr.write("voco train: error: it broke, as it was told to\n")
        sys.exit(3)
    (train if words[0] == "train" else evaluate)(words[1:])


if __name__ == "__main__":
    main()
