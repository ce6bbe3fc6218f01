"""What a reader has to open to follow the main path: files and functions that run, counted.

    python benchmarks/main_path.py [--list] [--json]

Two paths, on the shipped gridworld base (LoRA, K = 1), each run once before it is counted, so that what only
a first call does is left out:

    batch    one training batch: rows → VoCoDataCollator → VoCoSFTTrainer.training_step, backward pass
    included answer   one cached answer: an image compressed, its cache saved and loaded, a question answered
    from the file

A file counts where any of its functions ran; its own lines are all counted. Code of upstream libraries is
not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft import LoraConfig  # noqa: E402
from PIL import Image  # noqa: E402

import voco_plugin as vp  # noqa: E402
from voco_plugin.inference.answering import answer, compress_images  # noqa: E402

PACKAGE = Path(vp.__file__).resolve().parent


def executed(work: Callable[[], Any]) -> dict[str, set[str]]:
    """File of the package (relative) → names of its functions that ``work`` runs, in any thread."""
    seen: dict[str, set[str]] = {}

    def look(frame: Any, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        file = Path(code.co_filename)
        if PACKAGE in file.parents and code.co_name != "<module>":
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
            seen.setdefault(file.relative_to(PACKAGE).as_posix(), set()).add(f"{name}:{code.co_firstlineno}")

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return seen


def training_batch(folder: Path) -> Callable[[], Any]:
    """One training batch of a LoRA run on ``folder``'s model: two conversations of one image each."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in a1 ?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "images": [Image.new("RGB", (64, 64), colour)],
        }
        for colour, answer in (("red", "red circle"), ("blue", "blue square"))
    ]
    from datasets import Dataset

    args = vp.VoCoSFTConfig(
        str(folder / "run"), voco=vp.VoCoConfig(num_tokens=1), bf16=False, use_cpu=True, report_to=[],
        per_device_train_batch_size=2, logging_strategy="no", save_strategy="no",
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = vp.VoCoSFTTrainer(
        str(folder), args=args, train_dataset=Dataset.from_list(rows), peft_config=LoraConfig(r=4)
    )
    trainer.create_optimizer_and_scheduler(1)
    trainer.current_gradient_accumulation_steps = 1  # what Trainer.train sets
    trainer.model.train()
    given = list(trainer.train_dataset)

    def work() -> None:
        trainer.training_step(trainer.model, trainer.data_collator(given))

    return work


def cached_answer(folder: Path) -> Callable[[], Any]:
    """A question answered from the file of a compressed image, by ``folder``'s model."""
    model, processor = vp.load(str(folder), voco=vp.VoCoConfig(num_tokens=1))
    image, place = Image.new("RGB", (64, 64), "red"), folder / "image.safetensors"

    def work() -> None:
        next(iter(compress_images(model, processor, [image]))).save(place)
        answer(model, processor, ["what is in a1 ?"], caches=[vp.VoCoCache.load(place)], max_new_tokens=4)

    return work


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--list", action="store_true", help="name the files, with their functions")
    args = parser.parse_args()
    from voco_plugin.cli.gridworld import copy_base

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        copy_base(place)
        for name, make in (("batch", training_batch), ("answer", cached_answer)):
            work = make(Path(place))
            work()
            seen = executed(work)
            lines = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in seen}
            result[name] = {
                "files": len(seen), "functions": sum(map(len, seen.values())), "lines": sum(lines.values()),
                "seen": {file: sorted(names) for file, names in sorted(seen.items())},
            }  # fmt: skip
    if args.json:
        print(json.dumps(result))
        return
    for name, found in result.items():
        print(f"{name:8} {found['files']:3} files {found['functions']:4} functions {found['lines']:6,} lines")
        if args.list:
            for file, names in found["seen"].items():
                print(f"    {file:44} {len(names):3}  {', '.join(n.split(':')[0] for n in names)}")


if __name__ == "__main__":
    main()
