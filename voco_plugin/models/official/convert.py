"""``convert_official``: a checkpoint of the original LLaVA-1.5 or VoCo-LLaMA code → an ordinary transformers
one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...config import VoCoConfig
from ...core.layout import TokenVocabulary
from ...files import atomic_folder
from . import weights
from .checkpoint import Reader, weight_files
from .original import find_tower, find_weights, is_linear, local_folder, read_config
from .processor import (
    add_image_token,
    between_ids,
    chat_template,
    image_processor,
    load_tokenizer,
    make_processor,
    select_strategy,
)

VOCO = "<voco>"
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class Converted:
    """What :func:`convert_official` made.

    Attributes:
        folder: where it is.
        files: names of the weight files.
        image_token_id: id of ``<image>``.
        voco: the rule written to ``voco_config.json``; ``None`` for a plain LLaVA.
        dtype: of the weights written.
        notes: what a user should know of it.
    """

    folder: Path
    files: list[str]
    image_token_id: int
    voco: VoCoConfig | None
    dtype: str
    notes: list[str] = field(default_factory=list)


def convert_official(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    num_tokens: int | None = None,
    vision_tower: str | os.PathLike | None = None,
    language_model: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tick: Callable[[str], Any] | None = None,
) -> Converted:
    """Convert a checkpoint of the original LLaVA-1.5 or VoCo-LLaMA code.

    ``out`` becomes an ordinary ``LlavaForConditionalGeneration`` checkpoint with its processor, and, where
    the tokenizer has a ``<voco>`` token, a ``voco_config.json`` with the mask of the official code: text
    after the VoCo tokens sees nothing before the first of them, everything up to them is causal, positions
    are counted through.

    Args:
        source: folder or hub id: ``config.json`` of a ``LlavaLlamaForCausalLM``, its weights, its tokenizer.
        out: a folder that does not exist yet; it appears when it is whole.
        num_tokens: K, the number of VoCo tokens an image; the checkpoint does not say it. ``None``: 1.
        vision_tower: folder or hub id of the CLIP; ``None`` takes what ``mm_vision_tower`` names. Its weights
            are read only where the checkpoint has none of the tower.
        language_model: folder or hub id of the LLM of a stage-1 checkpoint (``mm_projector.bin`` alone).
        dtype: of the weights written; ``None`` keeps that of the language model.
        tick: called with the name of each weight file written.

    Raises:
        ValueError: what is in ``source`` is not such a checkpoint, or its tensors do not fit its config.
        FileNotFoundError: a file or folder is not there.
        FileExistsError: ``out`` is there already.
    """
    folder = local_folder(source, "checkpoint")
    config = read_config(folder)
    notes: list[str] = []
    reader = Reader()
    entries, unknown, llm = find_weights(folder, config, language_model, reader)
    tower, clip = find_tower(folder, config, vision_tower)
    if not weights.has_tower(entries):
        files = weight_files(tower)
        if not files:
            raise FileNotFoundError(
                f"{source} has no weights of the vision tower, and {tower} has none either; give the tower's "
                "folder as --vision-tower."
            )
        entries |= weights.tower_entries(reader.entries(files))
        notes.append(f"the vision tower's weights were taken from {tower}")

    tokenizer = load_tokenizer([folder, *([llm] if llm else [])])
    voco_id = tokenizer.get_vocab().get(VOCO)
    if voco_id is None and num_tokens is not None:
        raise ValueError(
            f"num_tokens={num_tokens} was given, but the tokenizer has no {VOCO} token: this is a plain "
            "LLaVA; leave it out."
        )
    rows = int(config["vocab_size"])
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the checkpoint {rows} rows: they do not belong "
            "together; copy the tokenizer that was saved with the weights."
        )
    if voco_id is None and len(tokenizer) < rows:
        notes.append(
            f"the weights have {rows} rows and the tokenizer {len(tokenizer)} tokens, none of them {VOCO}: "
            "if this is a VoCo-LLaMA, its tokenizer is missing and it was converted as a plain LLaVA"
        )
    image_id = add_image_token(tokenizer)
    dtype = dtype or str(_embeddings_dtype(entries, folder)).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}; choose one of them.")
    llava = _llava_config(config, clip, tokenizer, image_id, dtype)

    linear = is_linear(config)
    identity = int(config["hidden_size"]) if linear else None
    wanted = weights.expected_shapes(llava)
    source_shapes = dict(wanted)
    for name in (weights.EMBEDDINGS, weights.HEAD):
        if name in wanted:
            source_shapes[name] = (rows, wanted[name][1])
    if linear:
        source_shapes = {n: s for n, s in source_shapes.items() if ".linear_2." not in n}
    weights.check(entries, source_shapes, unknown, source, linear)
    target = getattr(torch, dtype)
    wider = {e.dtype for e in entries.values() if e.dtype.is_floating_point} - {target}
    if wider:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in wider))
        notes.append(f"tensors of {names} were written as {dtype}, which is what the model runs in")

    voco = None
    if voco_id is not None:
        voco = VoCoConfig(
            num_tokens=1 if num_tokens is None else num_tokens, rule="isolated", block_context="prefix",
            positions="sequential", hide_prefix=True, token=VOCO, token_id=voco_id,
        )  # fmt: skip
        if num_tokens is None:
            notes.append("K is not in the checkpoint: num_tokens=1 was taken; --num-tokens says otherwise")
    template = chat_template(config, VOCO if voco else None, voco.num_tokens if voco else 0)
    images = image_processor(tower, config.get("image_aspect_ratio"))
    processor = make_processor(config, tokenizer, images, clip.patch_size, template)

    with atomic_folder(out) as made:
        shards = weights.write_shards(
            weights.pieces(entries, reader, target, llava.text_config.vocab_size, identity),
            made, max_shard_size, tick,
        )  # fmt: skip
        llava.save_pretrained(made)
        _generation_config(llava).save_pretrained(made)
        processor.save_pretrained(made)
        if voco is not None:
            vocabulary = TokenVocabulary(
                voco_id=voco_id,
                placeholders=frozenset({image_id}),
                markers=frozenset(between_ids(tokenizer, config, VOCO)),
            )
            voco.save(made, vocabulary=vocabulary.to_dict(), row_made=False)
    return Converted(Path(out), shards, image_id, voco, dtype, notes)


def _embeddings_dtype(entries: dict[str, Any], folder: Path) -> torch.dtype:
    if weights.EMBEDDINGS not in entries:
        raise ValueError(f"{folder} has no model.embed_tokens.weight; its language model is missing.")
    return entries[weights.EMBEDDINGS].dtype


def _llava_config(config: dict[str, Any], clip: Any, tokenizer: Any, image_id: int, dtype: str) -> Any:
    from transformers import LlamaConfig, LlavaConfig

    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {
        "architectures", "model_type", "transformers_version", "dtype", "_name_or_path",
    }  # fmt: skip
    values = {key: value for key, value in config.items() if key in known}
    values.update(
        vocab_size=max(int(config["vocab_size"]), image_id + 1),
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    strategy: Any = select_strategy(config)  # "default" or "full"
    patches = (clip.image_size // clip.patch_size) ** 2
    clip.dtype = dtype
    llava = LlavaConfig(
        vision_config=clip,
        text_config=LlamaConfig(**values),
        image_token_index=image_id,
        projector_hidden_act="linear" if is_linear(config) else "gelu",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        image_seq_length=patches + (strategy == "full"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype,
    )
    if is_linear(config):  # the identity behind it does not train, as in a composed model
        llava.composed_of = {"fixed_layers": ["multi_modal_projector.linear_2"]}
    llava.architectures = ["LlavaForConditionalGeneration"]
    return llava


def _generation_config(llava: Any) -> Any:
    from transformers import GenerationConfig

    text = llava.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
