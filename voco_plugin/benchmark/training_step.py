"""A whole training step of a slice of a model: forward, loss, backward, optimizer; three ways on one set of
weights.

    plain causal     supervised tuning without VoCo tokens: vision tokens and text, stock SDPA
    VoCo, dense      VoCo tokens in place, the rule as one N × N mask
    VoCo, segmented  the same, the rule as calls without a mask

The slice has a few layers of a language model's real sizes. Its vocabulary is cut so that the LM head keeps
the share of the work that it has in the whole model, and its vision tower is a small one: both are the same
in all ways, and would only hide the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..config import VoCoConfig
from ..models import attach
from . import shapes
from .peak_memory import peak, reset_peak
from .timing import Way, compare, flops, interleaved_times, product_rate, synchronised, top_operations

PLAIN, DENSE, SEGMENTED = "plain causal", "VoCo, dense", "VoCo, segmented"
TUNES = ("lora", "full")
_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def cut_vocabulary(shape: str, layers: int) -> int:
    """Rows of the embedding such that head and layers keep their ratio, a multiple of 64, at least 256."""
    whole = int(shapes.SHAPES["vicuna7b"]["text"]["num_hidden_layers"])
    return max(round(shapes.VOCABULARY * layers / whole / 64) * 64, 256)


def three_ways(
    shape: str, *, layers: int, device: str, dtype: str, tune: str, rank: int = 64
) -> tuple[dict[str, Any], list[torch.nn.Parameter]]:
    """The three models on the same weights, and what trains of them."""
    vocabulary = cut_vocabulary(shape, layers)
    vision = "tiny" if shape == "tiny" else "small"
    model = shapes.build(shape, device, dtype, layers=layers, vision=vision, vocabulary=vocabulary)
    model.requires_grad_(False)
    if tune == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_TARGETS), model)
    else:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    models: dict[str, Any] = {PLAIN: model}
    for name, attention in ((DENSE, "dense"), (SEGMENTED, "segmented")):
        config = VoCoConfig(token_id=shapes.voco_id(model), attention=attention)
        models[name] = attach(shapes.twin(model), config)
    return models, [p for p in model.parameters() if p.requires_grad]


def train_case(
    models: dict[str, Any], trained: list[torch.nn.Parameter], *, images: int, text: int, num_tokens: int,
    repeats: int, limit: float | None, profile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One row of the benchmark: seconds of a step by way, and its ratio to plain causal."""
    plain = models[PLAIN]
    device = str(plain.device)
    inputs = shapes.prompt(plain, text, num_tokens, rows=1, images=images)
    bare = shapes.without_voco(plain, inputs)
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def labelled(batch: dict[str, Any]) -> dict[str, Any]:
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -text:] = batch["input_ids"][:, -text:]
        return {**batch, "labels": labels, "use_cache": False}

    batches = {name: labelled(bare if name == PLAIN else inputs) for name in models}

    def step(name: str, update: bool = True) -> None:
        models[name](**batches[name]).loss.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ways: dict[str, Way] = {
        name: synchronised(lambda name=name: lambda: step(name), device)  # type: ignore[misc]
        for name in models
    }
    counted = {name: flops(lambda name=name: step(name, update=False)) for name in models}  # type: ignore[misc]
    found = compare(interleaved_times(ways, repeats, warm_up=1, limit=limit), PLAIN)
    used = {}
    for name in (
        models if device != "cpu" else ()
    ):  # a process keeps what it freed: only a GPU's count is sharp
        before = reset_peak(device)
        step(name)
        used[name] = peak(device) - before
    case = {
        "images": images, "text_tokens": text, "num_tokens": num_tokens,
        "tokens": {name: batch["input_ids"].shape[1] for name, batch in batches.items()},
        "seconds": found["seconds"], "ratio_to_plain": found["ratio"], "flops": counted, "peak_bytes": used,
    }  # fmt: skip
    if profile:
        case["profile"] = {name: top_operations(lambda name=name: step(name)) for name in models}  # type: ignore[misc]
    return case


def train(
    images: Sequence[int], *, shape: str, layers: int, device: str, dtype: str, tune: str, text: int,
    num_tokens: int, repeats: int, limit: float | None, profile: bool = False,
    tick: Callable[[str], Any] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark: a case for each number of images in a row."""
    models, trained = three_ways(shape, layers=layers, device=device, dtype=dtype, tune=tune)
    text_config = models[PLAIN].config.text_config
    rate = product_rate(device, dtype)
    cases = []
    for count in images:
        tick(f"{count} image(s)")
        case = train_case(
            models, trained, images=count, text=text, num_tokens=num_tokens, repeats=repeats, limit=limit,
            profile=profile,
        )  # fmt: skip
        case["floor_seconds"] = {name: number / rate for name, number in case["flops"].items()}
        cases.append(case)
    return {
        "model": {
            "layers": layers, "hidden": text_config.hidden_size,
            "intermediate": text_config.intermediate_size, "heads": text_config.num_attention_heads,
            "vocabulary": text_config.vocab_size, "vocabulary_of_the_whole": shapes.VOCABULARY,
            "trained_parameters": sum(p.numel() for p in trained),
            "parameters": sum(p.numel() for p in models[PLAIN].parameters()),
        },
        "product_flops_per_second": rate, "cases": cases,
    }  # fmt: skip
