"""What ``VoCoSFTTrainer`` makes of the rows that plug-ins of other trainers are compared on.

    python tests/helpers/parity_reference.py OUT NAME…

writes, for each tiny model NAME, ``OUT/NAME/``: ``base`` and ``adapter`` (a model, and a LoRA to go on from),
and ``reference.json``: ids and labels of each row, and with all weights (``full``) and with the LoRA
(``lora``) the loss of each step and the logits of one question afterwards. ``OUT/rows.jsonl`` has the rows in
ms-swift's format (``<image>`` tags), ``OUT/parts.jsonl`` with parts for contents.
Run where TRL is as new as ``VoCoSFTTrainer`` needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOKENS = 2
STEPS, BATCH = 10, 2
SCHEDULE = {
    "per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-3, "weight_decay": 0.0,
    "adam_beta2": 0.999, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "seed": 42,
    "logging_steps": 1,
}  # fmt: skip
_SHAPES = ("circle", "square", "blue square", "red", "the green circle")


def rows() -> list[dict[str, Any]]:
    """Twenty conversations of one or two turns, one in five without a picture: texts with ``<image>`` tags,
    as ms-swift has them, and the pictures' numbers.
    """
    made = []
    for number in range(STEPS * BATCH):
        image = "" if number % 5 == 4 else "<image>"
        turns = [(f"{image}what color is shape {number}?", f"red {_SHAPES[number % 5]}")]
        if number % 3 == 1:
            turns.append(("sure? what is the shape", _SHAPES[(number + 2) % 5]))
        messages = []
        for asked, said in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        made.append({"messages": messages, "images": [number] if image else []})
    return made


def parted(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The same messages with parts for contents."""
    made = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(message["content"].split("<image>")):
            parts += [{"type": "image", "text": None}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        made.append({"role": message["role"], "content": parts})
    return made


def write_rows(out: Path) -> None:
    """``rows.jsonl``, and ``parts.jsonl`` with parts for contents."""
    from trainers import picture

    lines, parts = [], []
    for row in rows():
        paths = [str(out / f"{number}.png") for number in row["images"]]
        for number, path in zip(row["images"], paths, strict=True):
            picture(number).save(path)
        lines.append(json.dumps({"messages": row["messages"], "images": paths}))
        left = list(paths)
        messages = [
            {
                **message,
                "content": [
                    {"type": "image", "path": left.pop(0)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in parted(row["messages"])
        ]
        parts.append(json.dumps({"messages": messages}))
    (out / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (out / "parts.jsonl").write_text("\n".join(parts) + "\n")


def write_reference(out: Path, name: str) -> None:
    import torch
    from datasets import Dataset, Image, List

    import tiny
    import voco_plugin as vp
    from tiny import processors
    from trainers import LORA, logits, losses, picture, trainer

    torch.set_num_threads(1)
    folder = out / name
    tiny.build(name).save_pretrained(folder / "base")
    processors.processor(name).save_pretrained(folder / "base")
    messages = [parted(row["messages"]) for row in rows()]
    images = [[picture(number) for number in row["images"]] for row in rows()]
    data = Dataset.from_dict({"messages": messages, "images": images}).cast_column("images", List(Image()))

    def train(model: Any, into: Path, peft: Any, **more: Any) -> Any:
        options = {**SCHEDULE, "assistant_only_loss": True, "train_sampling_strategy": "sequential", **more}
        return trainer(model, into, data, peft=peft, voco=vp.VoCoConfig(num_tokens=TOKENS), **options)

    from peft import LoraConfig

    base = str(folder / "base")
    first = train(base, folder / "adapter", LoraConfig(**LORA), max_steps=1, learning_rate=1e-2)
    first.train()
    first.save_model()
    lora = train(str(folder / "adapter"), folder / "lora", False)
    batches = [lora.data_collator([row]) for row in data]
    lora.train()
    full = train(base, folder / "full", False)
    full.train()
    record = {
        "full_logits": logits(full.model, full.processing_class).tolist(),
        "lora_logits": logits(lora.model, lora.processing_class).tolist(),
        "input_ids": [batch["input_ids"][0].tolist() for batch in batches],
        "labels": [batch["labels"][0].tolist() for batch in batches],
        "full": losses(full),
        "lora": losses(lora),
    }
    (folder / "reference.json").write_text(json.dumps(record))


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()  # rows name their pictures by it
    place.mkdir(parents=True, exist_ok=True)
    write_rows(place)
    for model_name in sys.argv[2:]:
        write_reference(place, model_name)
