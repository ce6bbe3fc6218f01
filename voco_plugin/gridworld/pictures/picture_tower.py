"""A vision tower for named pictures: EfficientNet-Lite0, fine-tuned to name what each place shows.

    tower   8 x 8 tokens of 1,280 channels from a canvas of 256 pixels, stride 32
    heads   linear on every token, thrown away afterwards:
            name   which thing, or nothing; read off one token, and off the mean over a picture's square
            kind   which kind of thing, off the mean
            row, column   where the token is; a language model finds no place without it (docs/decisions.md)

The tower sees the training vendors' drawings of the training names alone. Each picture is turned, mirrored,
stretched and recoloured at random, since another vendor draws and colours the thing otherwise. The first
layers stay as ImageNet made them. `steps=0` measures ImageNet's features as they are.

Shapes: `B` canvases, `T` tokens (64), `D` channels (1,280).
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from voco_plugin.files import atomic_write_text
from voco_plugin.gridworld.pictures.lite0_weights import ARCHITECTURE, MEAN, STD, load_lite0
from voco_plugin.gridworld.pictures.picture_canvases import IGNORED, NOTHING, TOKENS, Canvases, Classes
from voco_plugin.gridworld.pictures.picture_dataset import SPLITS, Sources
from voco_plugin.gridworld.pictures.picture_scenes import SIDE

WIDTH = 1280
RECORD = "provenance.json"
_FROZEN_STAGES = 3
_PROBE_CANVASES, _PROBE_STEPS = 500, 400


def write_picture_tower(
    folder: str | Path,
    sources: Sources,
    weights: Path,
    *,
    steps: int = 600,
    batch_size: int = 12,
    learning_rate: float = 1e-3,
    seed: int = 0,
    test_scenes: int = 200,
    progress: Any = None,
) -> dict[str, Any]:
    """Fine-tune the tower and save it as a checkpoint folder that `compose(encoder=folder)` takes.

    Args:
        folder: to make; it must be empty or an earlier tower.
        sources: whose drawings of which names (`open_sources`).
        weights: file of ImageNet weights (`weights_file`).
        steps: of AdamW under a one-cycle schedule; 0 keeps ImageNet's weights.
        batch_size: canvases a step, each of six to nine pictures.
        learning_rate: of the tower; three times as much for the heads.
        seed: of canvases and heads.
        test_scenes: of each test split, to measure on.
        progress: called with a line of text now and then.

    Returns:
        The record, also in `provenance.json`: settings, accuracies 0…1 on scenes of the test splits,
        seconds, versions and the hash of the weights.

    Raises:
        ValueError: `folder` holds something else, or a setting is out of range.
    """
    for name, value, low in (
        ("steps", steps, 0),
        ("batch_size", batch_size, 1),
        ("test_scenes", test_scenes, 1),
    ):
        if value < low:
            raise ValueError(f"{name}={value} is out of range: give {low} or more")
    if learning_rate <= 0:
        raise ValueError(f"learning_rate={learning_rate} is out of range: give more than 0")
    out = Path(folder)
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise ValueError(f"{out} is not empty and holds no picture tower: give another folder")
    started, worked = time.perf_counter(), time.process_time()
    whole = load_lite0(weights).to(memory_format=torch.channels_last)
    classes = Classes(sources)
    say = progress or (lambda line: None)
    heads = _heads(classes, seed)
    if steps:
        _train(whole, heads, classes, steps, batch_size, learning_rate, seed, say)
    else:
        _probe(whole, heads, classes, seed, say)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    figures = measure(whole, heads, classes, seed, test_scenes)
    _save(whole, out)
    record = {
        "format": "picture tower",
        "architecture": ARCHITECTURE,
        "tokens": TOKENS * TOKENS,
        "width": WIDTH,
        "settings": {
            "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed,
            "frozen_stages": _FROZEN_STAGES,
        },
        "weights": {"file": weights.name, "sha256": _sha256(weights)},
        "drawn": {label: vendor.record() for label, vendor in sources.drawn.items()},
        "unseen": {label: vendor.record() for label, vendor in sources.unseen.items()},
        "names": len(classes.names),
        "accuracy": figures,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "versions": _versions(),
        "sha256": _sha256(out / "model.safetensors"),
    }  # fmt: skip
    atomic_write_text(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def _heads(classes: Classes, seed: int) -> torch.nn.ModuleDict:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"name": len(classes.names) + 1, "kind": len(classes.kinds), "row": TOKENS, "column": TOKENS}
    heads = torch.nn.ModuleDict({key: torch.nn.Linear(WIDTH, size) for key, size in sizes.items()})
    for head in heads.values():
        torch.nn.init.normal_(head.get_parameter("weight"), std=0.01, generator=generator)
        torch.nn.init.zeros_(head.get_parameter("bias"))
    return heads


def features(whole: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Tokens `(B, T, D)`, row by row."""
    found = whole.forward_features(pixels.contiguous(memory_format=torch.channels_last))
    return found.flatten(2).transpose(1, 2)


def _loss(heads: torch.nn.ModuleDict, tokens: torch.Tensor, seen: Canvases) -> torch.Tensor:
    """Naming off the squares and off single tokens, kinds, and places."""
    logits = heads["name"](tokens)  # linear: the mean of the logits is that of the mean
    named, labels = (seen.squares @ logits).flatten(0, 1), seen.names.flatten()
    each = torch.where(seen.tokens == NOTHING, logits.shape[-1] - 1, seen.tokens).flatten()
    kinds = (seen.squares @ heads["kind"](tokens)).flatten(0, 1)
    index = torch.arange(TOKENS * TOKENS).expand(len(tokens), -1).flatten()
    row, column = (heads[key](tokens).flatten(0, 1) for key in ("row", "column"))
    cross = functional.cross_entropy
    return (
        cross(named, labels, ignore_index=IGNORED, label_smoothing=0.1)
        + 0.5 * cross(logits.flatten(0, 1), each, ignore_index=IGNORED, label_smoothing=0.1)
        + 0.3 * cross(kinds, seen.kinds.flatten(), ignore_index=IGNORED)
        + 0.1 * (cross(row, index // TOKENS) + cross(column, index % TOKENS))
    )


def _train(
    whole: Any, heads: Any, classes: Classes, steps: int, batch_size: int, rate: float, seed: int, say: Any
) -> None:
    frozen = [whole.conv_stem, whole.bn1, *whole.blocks[:_FROZEN_STAGES]]
    whole.train()
    for module in frozen:
        module.eval()
        module.requires_grad_(False)
    body = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    groups = [{"params": body}, {"params": list(heads.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, 3 * rate], total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        seen = classes.training(batch_size, np.random.default_rng([seed, 200, step]))
        loss = _loss(heads, features(whole, seen.pixels), seen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(body, 5.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 19 or step == steps - 1:
            say(f"step {step + 1} of {steps}: loss {loss.item():.3f}")
    whole.eval().requires_grad_(True)


def _probe(whole: Any, heads: Any, classes: Classes, seed: int, say: Any) -> None:
    """Fit the heads alone to the tower as it is."""
    whole.eval()
    rng = np.random.default_rng([seed, 300])
    parts = []
    with torch.no_grad():
        for _ in range(-(-_PROBE_CANVASES // 20)):
            seen = classes.training(20, rng)
            parts.append((features(whole, seen.pixels), seen))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=_PROBE_STEPS, pct_start=0.1)
    for step in range(_PROBE_STEPS):
        tokens, seen = parts[step % len(parts)]
        loss = _loss(heads, tokens, seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    say(f"linear probe of ImageNet's features: loss {loss.item():.3f}")


@torch.no_grad()
def measure(whole: Any, heads: Any, classes: Classes, seed: int, number: int) -> dict[str, Any]:
    """Accuracies, 0…1, per test split: `name` and `kind` off the mean over a picture's square, `name_by_cell`
    and `kind_by_cell` off that over its whole cell, `place` of single tokens. Names held out from training
    have no `name`."""
    whole.eval()
    figures: dict[str, Any] = {}
    for split in SPLITS[1:]:
        seen = classes.test(split, number, seed)
        tokens = torch.cat([features(whole, part) for part in seen.pixels.split(20)])
        names, kinds = heads["name"](tokens)[..., :-1], heads["kind"](tokens)
        index = torch.arange(TOKENS * TOKENS)
        where = heads["row"](tokens).argmax(-1) * TOKENS + heads["column"](tokens).argmax(-1)
        figures[split] = {"place": (where == index).float().mean().item()}
        for key, logits, labels in (("name", names, seen.names), ("kind", kinds, seen.kinds)):
            there = labels != IGNORED
            if there.any():
                for end, over in (("", seen.squares), ("_by_cell", seen.cells)):
                    right = (over @ logits).argmax(-1) == labels
                    figures[split][key + end] = right[there].float().mean().item()
    return {
        split: {key: round(v, 4) for key, v in sorted(values.items())} for split, values in figures.items()
    }


def _save(whole: Any, out: Path) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    wrapper = TimmWrapperModel(TimmWrapperConfig(architecture=ARCHITECTURE))
    wrapper.timm_model.load_state_dict(whole.state_dict())
    wrapper.save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["pretrained_cfg"] = {  # what timm knows of the pixels
        "input_size": [3, SIDE, SIDE], "mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bicubic",
    }  # fmt: skip
    atomic_write_text(path, json.dumps(config, indent=2) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    import timm
    import transformers

    return {"torch": torch.__version__, "timm": timm.__version__, "transformers": transformers.__version__}
