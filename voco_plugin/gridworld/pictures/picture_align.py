"""Alignment on named pictures: the projector learns to say in the LLM's words what each vision token shows.

LLaVA's first stage reaches the same by captions, with the LLM in the loop: hours on a CPU. Here the projector
is fitted to the words' embeddings themselves, without the LLM: a token on a dog is to come out as the
embedding of " dog" (the mean over its tokens), a token on nothing as that of a line break: near it, and
nearer to it than to any other name's (a cross-entropy over distances; the distance alone leaves half of the
names to their neighbours). Tower and LLM stay as they are.

What a token says decides whether an LLM that was never trained on images reads it. Asked what is at a place,
SmolLM2-135M put one of the scene's names first, of 275 first tokens, for 43, 44 and 20 % of scenes of 1-2,
3-5 and 6-9 pictures where empty tokens are line breaks; for 9, 16 and 19 % where they are " nothing", and for
0, 7 and 0 % where the place's words are added to each token's (`benchmarks/picture_words.py`, 120 questions).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from voco_plugin.core.layout import tokenizer_of
from voco_plugin.gridworld.pictures.picture_scenes import SIDE

EMPTY = "\n"
"""What a token says where no picture is."""
# of a token's own square: less of a picture on it than this is none
_COVERED = 0.25
_IMAGES_AT_ONCE = 32


def align_projector(
    model: Any,
    processor: Any,
    folder: str | Path,
    *,
    num_images: int = 4000,
    num_test: int = 200,
    steps: int = 600,
    batch_size: int = 1024,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit the projector, in place.

    Args:
        model, processor: composed of a tower and an LLM, without VoCo.
        folder: the set, as `write_pictures` made it.
        num_images, num_test: so many of the splits `train` and `test`.
        steps, batch_size, learning_rate: of AdamW over vision tokens, three of four of them on a picture,
            under a one-cycle schedule.
        seed: of the batches.

    Returns:
        The record: `names`, the share of held-out tokens on a picture that come out nearest to their own
        name's embedding, of all names of the set; `alignment_error`, the mean squared distance there as a
        share of the target's variance; settings and seconds.

    Raises:
        ValueError: `folder` holds no set of named pictures.
    """
    started, folder = time.perf_counter(), Path(folder)
    try:
        scenes = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
        names = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["names"]
    except (OSError, ValueError, KeyError) as problem:
        raise ValueError(f"{folder} is no set of named pictures; `voco pictures` writes one.") from problem
    words = _Words(model, processor, names)
    features, target, seen = _pairs(model, processor, folder, scenes, "train", num_images, words)
    held, held_target, shown = _pairs(model, processor, folder, scenes, "test", num_test, words)
    projector = model.model.multi_modal_projector
    fixed = {name: p.requires_grad for name, p in projector.named_parameters()}
    trained = [p for p in projector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator, scale = torch.Generator().manual_seed(seed), words.table.std()
    drawn = [tokens for tokens in ((seen >= 0).nonzero()[:, 0], (seen < 0).nonzero()[:, 0]) if len(tokens)]
    for _ in range(steps):
        shares = (batch_size - batch_size // 4, batch_size // 4) if len(drawn) == 2 else (batch_size,)
        rows = torch.cat([
            tokens[torch.randint(len(tokens), (share,), generator=generator)]
            for tokens, share in zip(drawn, shares, strict=True)
        ])  # fmt: skip
        said = projector(features[rows].float())
        near = functional.cross_entropy(
            -torch.cdist(said, words.all).pow(2), seen[rows] % len(words.all), label_smoothing=0.05
        )
        loss = ((said - target[rows]) / scale).pow(2).mean() + near
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for name, parameter in projector.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(fixed[name])
    with torch.no_grad():
        found = projector(held.float())
        error = float((found - held_target).pow(2).mean() / held_target.var())
        on = shown >= 0
        right = float((torch.cdist(found[on], words.table).argmin(-1) == shown[on]).float().mean())
    return {
        "names": right, "alignment_error": error, "seconds": round(time.perf_counter() - started, 1),
        "settings": {
            "num_images": num_images, "num_test": num_test, "steps": steps, "batch_size": batch_size,
            "learning_rate": learning_rate, "seed": seed,
        },
    }  # fmt: skip


class _Words:
    """Embeddings of names, each the mean over its tokens, and of nothing."""

    def __init__(self, model: Any, processor: Any, names: Sequence[str]) -> None:
        tokenizer = tokenizer_of(processor)
        rows = model.get_input_embeddings().weight.detach().float()

        def mean(text: str) -> torch.Tensor:
            return rows[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)

        self.number = {name: index for index, name in enumerate(names)}
        self.table = torch.stack([mean(f" {name}") for name in names])
        self.empty = mean(EMPTY)
        self.all = torch.cat([self.table, self.empty[None]])  # nothing is the last: index -1


@torch.no_grad()
def _pairs(
    model: Any, processor: Any, folder: Path, scenes: dict[str, Any], split: str, number: int, words: _Words
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What goes into the projector `(T, D)`, what is to come out `(T, H)`, and the number of the name that
    each token shows, -1 for none `(T,)`.
    """
    keys = [key for key in scenes if key.rpartition("-")[0] == split][:number]
    if not keys:
        raise ValueError(f"{folder} has no pictures of the split {split}.")
    seen: list[torch.Tensor] = []
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    model.eval()
    try:
        for start in range(0, len(keys), _IMAGES_AT_ONCE):
            part = [folder / "images" / _file_of(key) for key in keys[start : start + _IMAGES_AT_ONCE]]
            images = [Image.open(path).convert("RGB") for path in part]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            model.model.get_image_features(pixels.flatten(0, -4))
    finally:
        hook.remove()
    features = torch.cat([one.reshape(len(one), -1, one.shape[-1]) for one in seen])  # (B, N, D)
    side = round(features.shape[1] ** 0.5)
    shown = torch.tensor([_tokens_of(scenes[key], side, words) for key in keys])
    target = torch.where(shown[..., None] >= 0, words.table[shown.clamp_min(0)], words.empty)
    return features.flatten(0, 1), target.flatten(0, 1), shown.flatten()


def _file_of(key: str) -> str:
    split, _, number = key.rpartition("-")
    return f"{split}/{number}.png"


def _tokens_of(scene: dict[str, Any], side: int, words: _Words) -> list[int]:
    """Per token, row by row, the number of the name that covers most of it; -1: none does enough."""
    step, found = SIDE / side, []
    for row in range(side):
        for column in range(side):
            best, most = -1, _COVERED * step * step
            for thing in scene["places"].values():
                left, top, right, bottom = thing["box"]
                wide = min(right, (column + 1) * step) - max(left, column * step)
                high = min(bottom, (row + 1) * step) - max(top, row * step)
                if wide > 0 and high > 0 and wide * high > most and thing["name"] in words.number:
                    best, most = words.number[thing["name"]], wide * high
            found.append(best)
    return found
