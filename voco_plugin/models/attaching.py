"""``attach`` and ``detach``: a model in memory gets the rule and the two-stage methods, and gives them
back.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .._compat import patch_llama4
from ..config import VoCoConfig
from ..core.attachment import ATTRIBUTE, Attachment, attachment, is_attached, unwrap
from ..core.attention import backend_for, register
from ..core.block_embeddings import NAME, BlockEmbeddings
from ..core.extension import extend, is_extended, is_shallow_copy, restore
from ..core.forward import TakesBlockEmbeddings, UnderRule
from ..core.layout import TokenVocabulary, plain_processor, tokenizer_of
from ..core.peft_layers import is_tuner
from ..inference.mixin import VoCoGenerationMixin
from ..inference.modeling_file import forget_file
from .compressors import build_compressor
from .families import family_of
from .image_first import begins_image, image_comes_first, warn_of_image_first
from .snapshot import as_given_on_failure
from .token_rows import add_token, embedding_rows, make_rows, remove_token, restore_rows


def attach(
    model: torch.nn.Module,
    config: VoCoConfig | None = None,
    processor: Any = None,
    *,
    vocabulary: TokenVocabulary | None = None,
    initialize_token: bool | None = None,
) -> torch.nn.Module:
    """Give ``model`` the isolation rule and the two-stage methods (paper, Sec. 3.2 and 3.3), in place.

    Args:
        model: any pure-attention ``AutoModelForImageTextToText``, PEFT-wrapped or not.
        config: the rule; defaults to ``VoCoConfig()``.
        processor: its processor: gets the VoCo token, and tells the marker ids. Optional:
            ``VoCoConfig(token_id=…)`` then names the token itself.
        vocabulary: the ids to read sequences by, where they cannot be told from config and processor.
        initialize_token: whether to initialise the token's embedding row; by default only where the token is
            new to the processor (a saved VoCo model keeps its trained row).

    Returns:
        the same object.

    Raises:
        ValueError: the model is attached already, or the rule cannot hold in it (the message says why).
    """
    config = dataclasses.replace(config) if config is not None else VoCoConfig()
    processor = plain_processor(processor)
    inner = unwrap(model)
    if is_attached(inner):
        raise ValueError("this model already has VoCo attached; detach it first.")
    if not hasattr(inner, "config") or not hasattr(inner, "get_decoder"):
        raise ValueError(f"{type(inner).__name__} is not a transformers image-text-to-text model.")
    family = family_of(inner.config)
    reason = family.refusal(inner)
    if reason is not None:
        raise ValueError(f"VoCo cannot be attached: {reason}.")
    text = family.text_model(inner)
    implementation = text.config._attn_implementation
    name = backend_for(implementation, config.attention)

    mended = [name for name, module in inner.named_modules() if is_extended(module)]  # by its owner
    undo: dict[str, Any] = {"implementation": implementation, "mended": mended}
    known = 0
    added = False
    with as_given_on_failure(inner, processor):
        if processor is not None:
            known = len(tokenizer_of(processor))
            config.token_id, added = add_token(processor, config)
            undo["token"] = config.token if added else None
            undo["known"] = set(tokenizer_of(processor).get_added_vocab())
        vocab = vocabulary or family.vocabulary(config=inner.config, processor=processor, voco=config)
        config.token_id = vocab.voco_id
        rows = embedding_rows(inner)
        if vocab.voco_id >= rows and processor is None:
            raise ValueError(
                f"VoCoConfig.token_id={vocab.voco_id} is outside the model's {rows} embedding rows; give an "
                f"id below {rows}, or processor=… so that the token is added."
            )
        new = added if initialize_token is None else initialize_token
        if new or vocab.voco_id >= rows:
            undo["rows"] = make_rows(inner, config, vocab.voco_id, known)
        register()
        state = Attachment(config, vocab, family, processor)
        state.restore = undo
        if config.makes_embeddings:
            state.embeddings = _block_embeddings(inner, config)
        text.config._attn_implementation_internal = name
        _extend(inner, state)
    forget_file(inner.config)
    if config.isolates and not config.hide_prefix and image_comes_first(processor, begins_image(vocab)):
        warn_of_image_first(processor)
    return model


def detach(model: torch.nn.Module) -> torch.nn.Module:
    """Give back the model as it was before :func:`attach`, in place: class, attention, forward, embedding
    rows.

    Weights that training changed stay as they are; the VoCo token's row and id go. Returns the same object.
    """
    inner = unwrap(model)
    state = attachment(inner)
    _check_can_take_off(inner, state)
    _take_off(inner, state.restore)
    if state.restore.get("token"):
        remove_token(state.processor, state.restore["token"])
    return model


def _extend(model: torch.nn.Module, state: Attachment) -> None:
    """Extend the classes of ``model``, of its backbone and, where VoCo tokens have embeddings of their own,
    of what gets the merged ones.
    """
    extend(model, VoCoGenerationMixin)
    object.__setattr__(model, ATTRIBUTE, state)
    backbone = state.family.backbone(model)
    if backbone is not model:
        extend(backbone, UnderRule)
        object.__setattr__(backbone, "_voco_of", state)
    if state.embeddings is not None:
        module, after = state.family.merged_at(model)
        extend(module, TakesBlockEmbeddings)
        object.__setattr__(module, "_voco_of", state)
        object.__setattr__(module, "_voco_after", after)
    patch_llama4(model)


def _check_can_take_off(model: torch.nn.Module, state: Attachment) -> None:
    """Refuse what could be taken off in part only, before anything changes.

    Raises:
        ValueError: an adapter holds the embedding rows that were added, another library has made a class on
            top of ours, or the submodules are those of another model too.
    """
    if is_shallow_copy(model):
        raise ValueError(
            "detach: this is a shallow copy (copy.copy), whose submodules are another model's too; "
            "detach that model."
        )
    for module in model.modules():
        if is_extended(module) and "_voco_extension" not in vars(type(module)):
            raise ValueError(
                f"detach: {type(module).__name__} was wrapped after the model was attached (FSDP2 makes a "
                "class "
                "of its own); detach the model before it is wrapped, or load it anew."
            )
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    held = any(_held_by_adapter(module) for module in embeddings if module is not None)
    if "rows" in state.restore and held:
        raise ValueError(
            "detach: an adapter holds the embedding rows that attach added (the VoCo token's row is "
            "trained); "
            "take the adapter off first: model = model.unload(), or merge_and_unload() to keep what it "
            "learnt."
        )


def _held_by_adapter(module: torch.nn.Module) -> bool:
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, AuxiliaryTrainingWrapper) or is_tuner(type(module))


def _take_off(model: torch.nn.Module, undo: dict[str, Any]) -> None:
    """Give back classes, attention and embedding rows."""
    state = vars(model).pop(ATTRIBUTE)
    state.detached = True
    for place, module in model.named_modules():
        if is_extended(module) and place not in undo["mended"]:
            restore(module)
        for name in ("_voco_of", "_voco_after", "_voco_hashes"):
            vars(module).pop(name, None)
    if hasattr(model, NAME):
        delattr(model, NAME)
    state.family.text_model(model).config._attn_implementation_internal = undo["implementation"]
    if "rows" in undo:
        restore_rows(model, undo["rows"])


def _block_embeddings(model: torch.nn.Module, config: VoCoConfig) -> BlockEmbeddings:
    """Give ``model`` the compressor that ``config`` names, with new weights."""
    weight = model.get_input_embeddings().weight
    made = build_compressor(config, model.config.get_text_config().hidden_size)
    made.check_model(model)
    model.add_module(NAME, made.to(weight.device, weight.dtype))
    return BlockEmbeddings(model)
