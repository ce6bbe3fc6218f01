"""Models whose LoRA acts by stage, with weights that say something, and what is held of them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model

import voco_plugin as vp
from harness import inputs, plain, text_columns, vocabulary
from tiny import voco_id

STAGES = ("compress", "separate")
LATENT = ("kv_b_proj",)
"""Of latent attention (DeepSeek, Kimi): it is applied to what the cache holds, and refused."""


def targets(model, beside=()) -> list[str]:
    """The linear layers of a model's decoder layers, without those that cannot act by stage."""
    layers = model._voco_attachment.family.text_model(model).layers
    inside = {id(m) for m in layers.modules() if type(m) is torch.nn.Linear}
    names = [n for n, m in model.named_modules() if id(m) in inside]
    if model.config.model_type == "glm4v_moe":  # PEFT takes names of its MLP for the experts' parameters
        names = [n for n in names if ".mlp." not in n]
    return [n for n in names if not n.endswith(LATENT)] + list(beside)


def based(name: str, dtype=torch.float32, stages: str = "compress", attn: str = "sdpa", **options):
    """An attached base, without an adapter."""
    model = plain(name, dtype, attn)
    config = vp.VoCoConfig(num_tokens=1, token_id=voco_id(name), adapter_stages=stages, **options)
    vp.attach(model, config, vocabulary=vocabulary(name, model, config))
    return model


def staged(
    name: str, stages: str, dtype=torch.float32, attn="sdpa", seed: int = 0, row: bool = False, **options
):
    """The same in PEFT: its LoRA weights are random, and with ``row`` so is the VoCo token's row."""
    model = based(name, dtype, stages, attn, **options)
    given = {"r": 4, "target_modules": targets(model), "init_lora_weights": False}
    rows = {"trainable_token_indices": [voco_id(name)]} if row else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if stages == "separate":
            wrapped = get_peft_model(model, LoraConfig(**given, **rows), adapter_name="compress")
            wrapped.add_adapter("read", LoraConfig(**given))
            wrapped.base_model.set_adapter(["compress", "read"])
        else:
            wrapped = get_peft_model(model, LoraConfig(**given, **rows))
        with torch.no_grad():
            for weight_name, weight in wrapped.named_parameters():
                if "trainable_tokens_delta" in weight_name:
                    weight.normal_()
    return wrapped.eval()


@torch.no_grad()
def moves(model, name: str) -> tuple[float, float]:
    """How far the adapter moves the logits of text behind an image, and of text alone."""
    found = []
    for row in (["bos", "t3", "img", "c2", "t4"], ["bos", "t9"]):
        batch = inputs(name, [row])  # alone: an expert rounds by which tokens it is given together
        on = model(**batch).logits
        with model.disable_adapter():
            off = model(**batch).logits
        columns = text_columns(model, batch)[0][4:]  # behind the image, where there is one
        found.append(float((on[0, columns] - off[0, columns]).abs().max()))
    return found[0], found[1]


def gradients(model, batch, labels, **forward) -> dict[str, torch.Tensor]:
    """Of the adapter's weights, for the mean loss of a batch."""
    model.zero_grad()
    logits = model(**batch, use_cache=False, **forward).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    loss.backward()
    return {n: copy.copy(p.grad) for n, p in model.named_parameters() if p.requires_grad}


def furthest(one: dict, other: dict) -> float:
    """The largest difference of two sets of gradients, as a share of the largest gradient."""
    assert one.keys() == other.keys()
    size = max(float(g.abs().max()) for g in one.values())
    assert size > 0
    return max(float((other[n] - g).abs().max()) for n, g in one.items()) / size
