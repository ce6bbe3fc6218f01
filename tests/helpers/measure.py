"""What the contracts measure of one tiny family: shared by the tests and by the table of
docs/backbones.md.
"""

from __future__ import annotations

import copy

import torch
from transformers import AttentionInterface

import voco_plugin as vp
from harness import ROWS, RULES, inputs, largest_difference, plain, shared, text_columns, vocabulary
from reference import base_mask, letters, rule_mask
from tiny import BOS, glue_ids, image_run, vision_ids, voco_id
from tiny.models import WINDOW
from tiny.wide import EAGER_ONLY


def groups_of(name: str, batch, row: int) -> list[int] | None:
    """Tokens that the backbone lets see each other both ways, by group; -1 outside."""
    if name in ("paligemma", "paligemma2"):  # its prompt, which here is everything
        return [0] * batch["input_ids"].shape[1]
    if name not in ("gemma3", "gemma4_both_ways"):
        return None
    types = batch["token_type_ids" if name == "gemma3" else "mm_token_type_ids"][row].tolist()
    groups, current = [], -1
    for i, kind in enumerate(types):  # soft tokens of one image
        current += kind == 1 and (i == 0 or types[i - 1] != 1)
        groups.append(current if kind == 1 else -1)
    return groups


def expected_masks(name: str, rule: str, batch) -> dict[str, torch.Tensor]:
    """``(B, N, N)`` per layer type, by brute force."""
    options = {
        k: v for k, v in RULES[rule].items() if k in ("rule", "block_context", "hide_prefix", "compressor")
    }
    sink = rule == "bos-sink"
    kinds = {
        "full_attention": {},
        "sliding_attention": {"window": WINDOW},
        "chunked_attention": {"chunk": WINDOW},
    }
    masks: dict[str, list] = {kind: [] for kind in kinds}
    for row in range(batch["input_ids"].shape[0]):
        ids = batch["input_ids"][row].tolist()
        text = letters(
            ids,
            batch["attention_mask"][row].tolist(),
            vision=vision_ids(name),
            voco=voco_id(name),
            glue=glue_ids(name),
            bos=BOS if sink else None,
        )
        shown = rule_mask(text, sink=sink, **options)
        for kind, limits in kinds.items():
            both = groups_of(name, batch, row)
            if name == "gemma4_both_ways" and kind == "full_attention":
                both = None  # Gemma 4 reads images both ways in its windowed layers only
            own = base_mask(text, groups=both, groups_past_window=name == "paligemma2", **limits)
            masks[kind].append(own & shown)
    return {k: torch.stack(v) for k, v in masks.items()}


def windowed_kind(name: str, types: list[str] | None, layer: int) -> str:
    """The layer type by which a layer's mask is to be read; some backbones window every layer."""
    if name in ("llava_mistral", "mistral3_window"):
        return "sliding_attention"
    return types[layer] if types else "full_attention"


@torch.no_grad()
def masks_seen(name: str, rule: str, attn: str, batch) -> list[tuple[int, torch.Tensor]]:
    """``(layer, (B, N, N) bool)`` of every text layer's attention in one forward."""
    model = shared(name, torch.float32, attn, rule)
    seen = []
    key = f"voco_{'eager' if name in EAGER_ONLY else attn}"
    stock = AttentionInterface._global_mapping[key]

    def spy(module, query, key_states, value, attention_mask, **kwargs):
        shown = attention_mask[:, 0]
        seen.append((module.layer_idx, shown if shown.dtype == torch.bool else shown == 0))
        return stock(module, query, key_states, value, attention_mask, **kwargs)

    AttentionInterface._global_mapping[key] = spy
    try:
        model(**batch)
    finally:
        AttentionInterface._global_mapping[key] = stock
    return seen


def layers_as_the_table(name: str, rule: str = "isolated") -> tuple[int, int]:
    """How many layers' masks equal the loops over the design's table, of how many."""
    batch = inputs(name, ROWS, "left")
    expected, real = expected_masks(name, rule, batch), batch["attention_mask"].bool()
    text = shared(name, torch.float32, "sdpa", rule)._voco_attachment.family.text_model(shared(name))
    types = getattr(text.config, "layer_types", None)
    seen = masks_seen(name, rule, "sdpa", batch)
    equal = [
        torch.equal(mask[real], expected[windowed_kind(name, types, layer)][real]) for layer, mask in seen
    ]
    return sum(equal), text.config.num_hidden_layers


@torch.no_grad()
def two_stage(model, name: str, dtype=torch.float32) -> float:
    """Largest difference of text logits, single masked pass against compress and answer, both padding
    sides.
    """
    worst = 0.0
    for side in ("right", "left"):
        batch = inputs(name, ROWS, side, dtype)
        logits, cache, stream = model(**batch).logits, model.compress(**batch), model.stream_inputs(batch)
        cached = model(**stream, voco_cache=cache).logits
        worst = max(worst, largest_difference(model, batch, logits, stream, cached))
    return worst


@torch.no_grad()
def batched(name: str) -> float:
    """Largest difference of text logits, a row of a batch against the row alone."""
    model, worst = shared(name), 0.0
    batch = inputs(name, ROWS, "left")
    logits, columns = model(**batch).logits, text_columns(model, batch)
    for row in range(len(ROWS)):
        alone = inputs(name, [ROWS[row]], first_row=row)
        own = text_columns(model, alone)[0]
        worst = max(worst, float((logits[row, columns[row]] - model(**alone).logits[0, own]).abs().max()))
    return worst


def moved_batch(name: str, far: int = 40):
    """Two prompts of an image each, and a third that holds both images the other way round, elsewhere."""
    one = inputs(name, [["bos", "t3", "img", "c2", "t4"]], first_row=0)
    two = inputs(name, [["img", "c1", "t3"]], first_row=1)
    between = 2
    if name == "llama4":  # attends in chunks: a block moves by whole chunks only
        while (far + len(image_run(name)) + 1 + between - 4) % WINDOW:
            between += 1
    segments = [f"t{far}", "img", "c1", f"t{between}", "img", "c2", "t3"]
    joined = dict(inputs(name, [segments], first_row=2))
    for key, value in one.items():
        if key not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            dim = 1 if name in ("idefics2", "idefics3", "smolvlm") else 0  # images of one row side by side
            joined[key] = torch.cat([two[key], value], dim=dim)
    return one, two, joined


@torch.no_grad()
def relocated(name: str) -> float | None:
    """Largest difference of text logits, blocks reused at other places against a fresh pass; ``None`` where
    the family tiles an image differently when it is not alone, so that the vision tokens are not the same.
    """
    model = shared(name)
    one, two, joined = moved_batch(name)
    if "batch_num_images" in joined:
        return None
    cache = vp.VoCoCache.cat([model.compress(**two), model.compress(**one)])
    logits, stream = model(**joined).logits, model.stream_inputs(joined)
    cached = model(**stream, voco_cache=cache).logits
    return largest_difference(model, joined, logits, stream, cached)


def lora(name: str, dtype=torch.float32):
    """An attached model under PEFT, with random LoRA weights on every linear layer of its decoder layers."""
    from peft import LoraConfig, get_peft_model

    model = plain(name, dtype)
    config = vp.VoCoConfig(num_tokens=1, token_id=voco_id(name))
    vp.attach(model, config, vocabulary=vocabulary(name, model, config))
    layers = model._voco_attachment.family.text_model(model).layers
    inside = {id(m) for m in layers.modules() if type(m) is torch.nn.Linear}  # Llama 4's router is a subclass
    names = [n for n, m in model.named_modules() if id(m) in inside]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    return wrapped.eval()


def lora_two_stage(name: str) -> tuple[float, float]:
    """Two-stage difference under LoRA, and how far LoRA moved the logits (it must)."""
    wrapped = lora(name)
    batch = inputs(name, ROWS, "left")
    with torch.no_grad():
        real = batch["attention_mask"].bool()
        with wrapped.disable_adapter():
            before = wrapped(**batch).logits[real]
        moved = float((wrapped(**batch).logits[real] - before).abs().max())
    return two_stage(wrapped, name), moved


def checkpointed(name: str) -> float:
    """Largest difference of gradients with and without gradient checkpointing, under the rule, as a share of
    the largest gradient.
    """
    model = plain(name)
    config = vp.VoCoConfig(num_tokens=1, token_id=voco_id(name))
    vp.attach(model, config, vocabulary=vocabulary(name, model, config))
    batch = inputs(name, ROWS[:1])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == voco_id(name), -100)
    found = []
    for on in (False, True):
        copied = copy.deepcopy(model).train()
        for module in copied.modules():  # same function, dropout aside
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if on:
            copied.gradient_checkpointing_enable({"use_reentrant": False})
            layers = copied._voco_attachment.family.text_model(copied).layers
            assert all(layer.gradient_checkpointing for layer in layers)
        logits = copied(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
        loss.backward()
        found.append({n: p.grad for n, p in copied.named_parameters() if p.grad is not None})
    size = max(float(g.abs().max()) for g in found[0].values())
    assert size > 0 and found[0].keys() == found[1].keys()
    return max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0]) / size


def window_of(name: str) -> str:
    """The family's window or chunk, in tokens, or a dash."""
    text = shared(name)._voco_attachment.family.text_model(shared(name))
    types = getattr(text.config, "layer_types", None)
    kinds = {windowed_kind(name, types, layer) for layer in range(text.config.num_hidden_layers)}
    if "chunked_attention" in kinds:
        return f"chunks of {WINDOW}"
    return f"window {WINDOW}" if "sliding_attention" in kinds else "–"


__all__ = ["RULES", "batched", "checkpointed", "expected_masks", "layers_as_the_table", "lora_two_stage"]
