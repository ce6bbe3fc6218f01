"""Tiny checkpoints as the original LLaVA and VoCo-LLaMA code saves them, and what that code computes.

Nothing here uses the package under test: names, files and the tokenizer are written by hand, the tokenizer
as a real SentencePiece model. The reference runs transformers' plain CLIP and Llama over merged embeddings,
under the mask of the original code, cell by cell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
_WORDS = ("the", "what", "is", "red", "image", "of", "user", "chat", "A", "USER", "ASSISTANT")
_CHARS = "".join(chr(c) for c in range(33, 127))


def _pieces() -> list[tuple[str, int]]:
    """``(piece, type)`` of the vocabulary: 2 unknown, 3 control, 6 byte, 1 ordinary."""
    rows = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    merged = [("▁" + w)[:i] for w in _WORDS for i in range(2, len(w) + 2)]
    return rows + [(piece, 1) for piece in dict.fromkeys([*merged, "▁", *_CHARS])]


def write_sentencepiece(path: Path) -> None:
    """Write a real ``tokenizer.model`` (BPE, byte fallback, as Llama's)."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for number, (piece, kind) in enumerate(_pieces()):
        model.pieces.add(piece=piece, score=0.0 if kind != 1 else -float(number), type=kind)
    path.write_bytes(model.SerializeToString())


def write_tokenizer(folder: Path, voco: bool, slow: bool) -> int:
    """The tokenizer's files as that code saves them (slow, needs sentencepiece), or as a fast one; its
    length.
    """
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    size = len(_pieces())
    if slow:
        write_sentencepiece(folder / "tokenizer.model")
        more = {"additional_special_tokens": ["<voco>"]} if voco else {}
        config = {
            **special, "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True,
            "add_eos_token": False, "model_max_length": 2048, "padding_side": "right", "sp_model_kwargs": {},
        }  # fmt: skip
        if voco:
            (folder / "added_tokens.json").write_text(json.dumps({"<voco>": size}))
        (folder / "special_tokens_map.json").write_text(json.dumps({**special, **more}))
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
        return size + voco
    from transformers import LlamaTokenizer

    vocab = {piece: number for number, (piece, _) in enumerate(_pieces())}
    merges = [(p[:-1], p[-1]) for p, kind in _pieces() if kind == 1 and len(p) > 1]
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, legacy=False, pad_token="<unk>", add_bos_token=True
    )
    if voco:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<voco>"]})
    tokenizer.save_pretrained(folder)
    return size + voco


def llama_state(rows: int, seed: int = 0, std: float = 0.2) -> dict[str, torch.Tensor]:
    """Random weights of a Llama under its own names."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=rows))
    return {n: _noise(n, t, std) for n, t in model.state_dict().items()}


def clip_state(seed: int = 1, std: float = 0.2) -> dict[str, torch.Tensor]:
    """Random weights of a CLIP vision tower, under the names of CLIP's published checkpoints."""
    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    return {
        "vision_model." + n.removeprefix("vision_model."): _noise(n, t, std)
        for n, t in model.state_dict().items()
        if not n.endswith("position_ids")
    }


def projector_state(kind: str, seed: int = 2, std: float = 0.2) -> dict[str, torch.Tensor]:
    """``mm_projector`` weights, without the ``model.`` before them."""
    torch.manual_seed(seed)
    vision, text = CLIP["hidden_size"], LLAMA["hidden_size"]
    if kind == "linear":
        sizes = {"": (vision, text)}
    elif kind == "mlp1x_gelu":
        sizes = {"0.": (vision, text)}
    else:
        sizes = {"0.": (vision, text), "2.": (text, text)}
    return {
        f"mm_projector.{n}{leaf}": std * torch.randn(o, i) if leaf == "weight" else std * torch.randn(o)
        for n, (i, o) in sizes.items()
        for leaf in ("weight", "bias")
    }


def _noise(name: str, tensor: torch.Tensor, std: float) -> torch.Tensor:
    offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return offset + std * torch.randn(tensor.shape)


def write_tower(folder: Path, state: dict[str, torch.Tensor] | None, whole: bool = True) -> Path:
    """A CLIP folder: config, image processor and (unless ``state`` is None) weights, with a text half."""
    folder.mkdir(parents=True)
    if whole:
        config: dict[str, Any] = {
            "model_type": "clip",
            "vision_config": {**CLIP, "model_type": "clip_vision_model"},
        }
    else:
        config = {**CLIP, "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    side = CLIP["image_size"]
    CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    if state is not None:
        half = {
            "text_model.embeddings.token_embedding.weight": torch.zeros(3, 4),
            "logit_scale": torch.tensor(4.6),
        }
        ids = {"vision_model.embeddings.position_ids": torch.arange(10)[None]}
        torch.save({**state, **(half if whole else {}), **ids}, folder / "pytorch_model.bin")
    return folder


def write_checkpoint(
    folder: Path,
    *,
    voco: bool = True,
    projector: str = "mlp2x_gelu",
    safetensors: bool = False,
    tower_inside: bool = False,
    slow: bool = False,
    shards: int = 2,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """A checkpoint folder as that code's trainer writes it, with the tower in ``folder/../tower``.

    Returns:
        the state dict written, tower included, in fp32 names of that code.
    """
    folder.mkdir(parents=True)
    rows = write_tokenizer(folder, voco, slow)
    tower = clip_state()
    state = {**llama_state(rows), **{"model." + n: t for n, t in projector_state(projector).items()}}
    inside = {"model.vision_tower.vision_tower." + n: t for n, t in tower.items()}
    write_tower(folder.parent / "tower", None if tower_inside else tower)
    saved = {**state, **(inside if tower_inside else {})}
    saved["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # as old releases did
    write_config(folder, rows, projector=projector, **config)
    saved = {n: t.to(dtype) for n, t in saved.items()}
    write_weights(folder, saved, shards, safetensors)
    (folder / "mm_projector.bin").write_bytes(b"left over from stage 1, and not read")
    return {**state, **inside}


def write_config(folder: Path, rows: int, *, projector: str = "mlp2x_gelu", **more: Any) -> None:
    """``config.json`` of a ``LlavaLlamaForCausalLM``."""
    config = {
        **LLAMA, "vocab_size": rows, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama",
        "mm_vision_tower": str(folder.parent / "tower"), "mm_hidden_size": CLIP["hidden_size"],
        "mm_projector_type": projector, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad", "use_mm_proj": True, "tune_mm_mlp_adapter": False, "pretraining_tp": 1,
        "tokenizer_padding_side": "left", "tokenizer_model_max_length": 2048, "rope_scaling": None,
        "rope_theta": 5000.0, "torch_dtype": "bfloat16", "transformers_version": "4.37.2", "use_cache": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **more}))


def write_weights(folder: Path, state: dict[str, torch.Tensor], shards: int, safetensors: bool) -> None:
    """``state`` over ``shards`` files with an index, or in one file."""
    from safetensors.torch import save_file

    stem, end = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    names, where = list(state), {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{end}" if shards > 1 else f"{stem}.{end}"
        part = {n: state[n].contiguous() for n in names[number::shards]}
        where |= dict.fromkeys(part, file)
        if safetensors:
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


# -- what the original code computes


def official_mask(letters: str) -> torch.Tensor:
    """Who sees whom there, ``(N, N)`` bool. ``C`` is a VoCo token; every other letter only counts.

    A query up to the last VoCo token sees all that is before it; one after it sees only what is not before
    the first VoCo token. Without VoCo tokens everything is causal.
    """
    first, last = letters.find("C"), letters.rfind("C")
    shown = torch.zeros(len(letters), len(letters), dtype=torch.bool)
    for query in range(len(letters)):
        for key in range(query + 1):
            shown[query, key] = first < 0 or query <= last or key >= first
    return shown


@torch.no_grad()
def official_logits(
    state: dict[str, torch.Tensor], ids: list[int], pixels: torch.Tensor, voco_id: int | None, **options: Any
) -> torch.Tensor:
    """Logits ``(N, rows)`` of the original code; id -200 stands for the image ``(1, 3, H, W)``."""
    projector, layer = options.get("projector", "mlp2x_gelu"), options.get("select_layer", -2)
    clip = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    inside = "model.vision_tower.vision_tower."
    found = {n.removeprefix(inside): t for n, t in state.items() if n.startswith(inside)}
    own = {n.removeprefix("vision_model."): n for n in clip.state_dict()}
    clip.load_state_dict({own[n.removeprefix("vision_model.")]: t for n, t in found.items()}, strict=False)
    assert {n.removeprefix("vision_model.") for n in found} >= {n for n in own if "position_ids" not in n}
    features = clip(pixels, output_hidden_states=True).hidden_states[layer]
    features = features if options.get("class_token") else features[:, 1:]
    weight = {n.removeprefix("model.mm_projector."): t for n, t in state.items() if "mm_projector" in n}
    if projector in ("linear", "mlp1x_gelu"):
        dot = "" if projector == "linear" else "0."
        features = nn.functional.linear(features, weight[dot + "weight"], weight[dot + "bias"])
    else:
        features = nn.functional.gelu(nn.functional.linear(features, weight["0.weight"], weight["0.bias"]))
        features = nn.functional.linear(features, weight["2.weight"], weight["2.bias"])

    language = {n: t for n, t in state.items() if "mm_projector" not in n and "vision_tower" not in n}
    rows = language["lm_head.weight"].shape[0]
    config = LlamaConfig(**LLAMA, vocab_size=rows, rope_theta=options.get("theta", 5000.0))
    config._attn_implementation = "sdpa"
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(language)
    letters, parts = "", []
    for token in ids:
        if token == -200:
            parts.append(features[0])
            letters += "v" * features.shape[1]
        else:
            parts.append(language["model.embed_tokens.weight"][token][None])
            letters += "C" if token == voco_id else "t"
    embeds = torch.cat(parts)[None]
    hidden = torch.where(official_mask(letters), 0.0, torch.finfo(torch.float32).min)[None, None]
    positions = torch.arange(len(letters))[None]
    return llama(inputs_embeds=embeds, attention_mask=hidden, position_ids=positions).logits[0]
