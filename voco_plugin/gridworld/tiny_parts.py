"""Tiny encoders of three libraries and tiny LLMs of three classes, as checkpoint folders to compose from.

    out_dir/
      transformers_clip  timm_vit  open_clip_vit      encoders, trained to tell cells as `pretrain_tower` does
      llama  qwen3  gemma3                            LLMs with random weights and the gridworld tokenizer

`voco gridworld … --parts out_dir` writes them; `recipes/gridworld_compose.yaml` names two of them.

Shapes: `B` images, `S` pixels a side, `N` patches an image, `D` width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from voco_plugin.gridworld.tiny_processor import CHAT_TEMPLATE, build_tokenizer
from voco_plugin.gridworld.tiny_tower import CELL_CLASSES, INIT_STD, patch_data
from voco_plugin.models.encoders.base import Encoder, load_encoder

ENCODERS = ("transformers_clip", "timm_vit", "open_clip_vit")
LLMS = ("llama", "qwen3", "gemma3")
_MEAN, _STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def write_tiny_parts(
    out_dir: str | Path,
    *,
    grid: int = 2,
    num_colors: int = 4,
    cell_pixels: int = 32,
    patch_size: int = 16,
    width: int = 128,
    question_set: str = "phrases",
    boxes: bool = False,
    tower_steps: int = 600,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Write every encoder and LLM.

    Args:
        out_dir: folder to make.
        grid, num_colors, cell_pixels: the gridworld that the encoders are trained on.
        patch_size: pixels.
        width: D of encoders and LLMs.
        question_set, boxes: whose words the LLMs' tokenizer has.
        tower_steps: of an encoder's training; 0 leaves it random.
        seed: of all weights, images and batches.

    Returns:
        for each encoder, the share of held-out patches whose cell and whose place a linear head tells.
    """
    out = Path(out_dir)
    world = (grid, num_colors, cell_pixels)
    figures = {}
    for name in ENCODERS:
        figures[name] = write_tiny_encoder(
            out / name, name, world, patch_size=patch_size, width=width, steps=tower_steps, seed=seed
        )
    for name in LLMS:
        write_tiny_llm(out / name, name, width=width, question_set=question_set, boxes=boxes, seed=seed)
    return figures


def write_tiny_encoder(
    folder: Path,
    name: str,
    world: tuple[int, int, int],
    *,
    patch_size: int = 16,
    width: int = 128,
    steps: int = 600,
    seed: int = 0,
) -> dict[str, float]:
    """Write one of `ENCODERS` for the gridworld `(cells a side, colours, pixels a cell)`; its figures.

    The tower is trained through what a composed model will read: the features of the encoder as loaded. It
    is saved whole, with the last block that these features do not pass.
    """
    size = world[0] * world[2]
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        whole = _build(name, size, patch_size, width)
        whole.save_pretrained(folder)
        _write_processor(folder, name, size)
        encoder = load_encoder(str(folder))
        if not steps:
            return {}
        figures = _pretrain(encoder, world, steps, seed)
        trained = encoder.tower.state_dict()
        kept = {k: trained[k] for k in whole.state_dict() if k in trained}
        whole.load_state_dict({**whole.state_dict(), **kept})
        whole.save_pretrained(folder)
    finally:
        torch.random.set_rng_state(state)
    return figures


def _build(name: str, size: int, patch: int, width: int) -> Any:
    heads = max(1, width // 32)
    if name == "transformers_clip":
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3, num_attention_heads=heads,
            image_size=size, patch_size=patch, projection_dim=width,
        )  # fmt: skip
        model: Any = CLIPVisionModel(config)
    elif name == "timm_vit":
        from transformers import TimmWrapperConfig, TimmWrapperModel

        args = {"embed_dim": width, "depth": 3, "num_heads": heads, "img_size": size, "patch_size": patch}
        model = TimmWrapperModel(TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args))
    elif name == "open_clip_vit":
        from voco_plugin.models.encoders.open_clip_model import OpenClipVisionConfig, OpenClipVisionModel
        from voco_plugin.models.registration import register

        register()
        vision = {
            "layers": 3, "width": width, "head_width": width // heads, "image_size": size, "patch_size": patch
        }  # fmt: skip
        model = OpenClipVisionModel(
            OpenClipVisionConfig(
                vision_cfg=vision, embed_dim=width, hidden_size=width, image_size=size, patch_size=patch
            )
        )
    else:
        raise ValueError(f"no tiny encoder {name!r}; one of {', '.join(ENCODERS)}.")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=INIT_STD)
            bias = getattr(module, "bias", None)
            if bias is not None:
                torch.nn.init.zeros_(bias)
    return model.eval()


def _write_processor(folder: Path, name: str, size: int) -> None:
    """Images pass at their own size, scaled to -1…1, whatever the library."""
    if name == "timm_vit":  # timm says it in the model's config
        import json

        from voco_plugin.files import atomic_write_text

        path = folder / "config.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["pretrained_cfg"] = {
            "input_size": [3, size, size], "mean": _MEAN, "std": _STD, "crop_pct": 1.0,
            "interpolation": "bicubic",
        }  # fmt: skip
        atomic_write_text(path, json.dumps(record, indent=2) + "\n")
        return
    from transformers import CLIPImageProcessor

    CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size},
        image_mean=list(_MEAN), image_std=list(_STD),
    ).save_pretrained(folder)  # fmt: skip


def _pretrain(encoder: Encoder, world: tuple[int, int, int], steps: int, seed: int) -> dict[str, float]:
    """Train the tower, in place, with two linear heads on its features; how much they tell afterwards."""
    grid, colors, cell = world
    side = encoder.grid[0]

    def data(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return patch_data(encoder.image_processor, side, grid, colors, cell, count, split, seed)

    images, cells = data("train", 6000)
    held_images, held_cells = data("test", 256)
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.nn.Linear(encoder.hidden_size, n) for n in (len(CELL_CLASSES), side * side)]
    for head in heads:
        torch.nn.init.normal_(head.weight, std=INIT_STD, generator=generator)
    parameters = [p for module in (encoder.tower, *heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    places = torch.arange(side * side)
    encoder.tower.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        features = encoder.features(images[rows])
        loss = torch.nn.functional.cross_entropy(heads[0](features).flatten(0, 1), cells[rows].flatten())
        target = places.expand(len(rows), -1).flatten()
        loss = loss + torch.nn.functional.cross_entropy(heads[1](features).flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    encoder.tower.eval()
    with torch.no_grad():
        features = encoder.features(held_images)
        right = (heads[0](features).argmax(-1) == held_cells).float().mean().item()
        placed = (heads[1](features).argmax(-1) == places).float().mean().item()
    return {"cell_accuracy": right, "position_accuracy": placed}


def write_tiny_llm(
    folder: Path,
    name: str,
    *,
    width: int = 128,
    layers: int = 4,
    question_set: str = "phrases",
    boxes: bool = False,
    seed: int = 0,
) -> None:
    """Write one of `LLMS`, with random weights, and the gridworld tokenizer of `question_set`."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

    tokenizer = build_tokenizer(question_set, boxes)
    tokenizer.chat_template = CHAT_TEMPLATE
    heads = max(1, width // 32)
    common: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": width // heads, "max_position_embeddings": 1024, "initializer_range": INIT_STD,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    kinds: dict[str, Any] = {
        "llama": lambda: LlamaConfig(**common, tie_word_embeddings=False),
        "qwen3": lambda: Qwen3Config(**common, tie_word_embeddings=False),
        "gemma3": lambda: Gemma3TextConfig(**common, query_pre_attn_scalar=width // heads, sliding_window=64),
    }
    if name not in kinds:
        raise ValueError(f"no tiny LLM {name!r}; one of {', '.join(LLMS)}.")
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kinds[name]())
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
