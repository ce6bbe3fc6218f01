"""Trainers of tiny models, and what is read off them."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL import Image as PILImage

import voco_plugin as vp

ROWS = 8


LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0, "init_lora_weights": "gaussian"}


def picture(seed: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8))


def trainer(model, out, data, peft=True, voco=True, **options):
    args = {
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "max_steps": 3, "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    more = options.pop("more", {})
    more |= {k: options.pop(k) for k in ("eval_dataset", "data_collator", "processing_class") if k in options}
    voco = vp.VoCoConfig(num_tokens=2) if voco is True else voco or None
    config = vp.VoCoSFTConfig(str(out), voco=voco, **{**args, **options})
    peft = LoraConfig(**LORA) if peft is True else peft or None
    with contextlib.redirect_stderr(io.StringIO()):
        return vp.VoCoSFTTrainer(model, args=config, train_dataset=data, peft_config=peft, **more)


def logits(model, processor) -> torch.Tensor:
    """Of one question about a picture, VoCo tokens put in where the model is attached."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=picture(1), text=text, return_tensors="pt")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if vp.is_attached(model):
        inputs = inner.insert_voco_tokens(inputs)
    with torch.no_grad():
        return model(**inputs).logits


def losses(made) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def snapshot(made) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def moved(before: dict, made) -> set[str]:
    return {name for name, p in made.model.named_parameters() if not torch.equal(before[name], p)}


def rows() -> Dataset:
    """Eight conversations, one of them without an image; with ids."""
    image, ask = {"type": "image", "text": None}, {"type": "text", "text": "what is it"}
    answers = ["red", "blue circle", "green square"]
    messages = [
        [
            {"role": "user", "content": [image, ask] if i != 5 else [ask]},  # one row without an image
            {"role": "assistant", "content": [{"type": "text", "text": answers[i % 3]}]},
        ]
        for i in range(ROWS)
    ]
    images = [[picture(i)] if i != 5 else [] for i in range(ROWS)]
    features = {"messages": messages, "images": images, "id": [f"row-{i}" for i in range(ROWS)]}
    return Dataset.from_dict(features).cast_column("images", List(Image()))
