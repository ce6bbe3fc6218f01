"""``attach`` and ``detach``: a model in memory gets the rule and the two-stage methods, and gives them
back.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from typing import Any

import torch

from .._compat import mend_llama4
from ..config import VoCoConfig
from ..core.attached import ATTRIBUTE, attachment, is_attached, unwrap
from ..core.attention import backend_for, register
from ..core.block_embeddings import NAME, BlockEmbeddings
from ..core.forward import Attachment
from ..core.layout import TokenVocabulary
from ..inference.mixin import VoCoGenerationMixin
from .compressors import build_compressor
from .families import family_of
from .token_rows import add_token, embedding_rows, make_rows, remove_token, restore_rows

logger = logging.getLogger(__name__)

_CLASSES: dict[type, type] = {}


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

    restore: dict[str, Any] = {"class": type(inner), "implementation": implementation}
    known = 0
    added = False
    if processor is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        known = len(tokenizer)
        config.token_id, added = add_token(processor, config)
        restore["token"] = config.token if added else None
    try:
        vocab = vocabulary or family.vocabulary(config=inner.config, processor=processor, voco=config)
        config.token_id = vocab.voco_id
        rows = embedding_rows(inner)
        if vocab.voco_id >= rows and processor is None:
            raise ValueError(
                f"VoCoConfig.token_id={vocab.voco_id} is outside the model's {rows} embedding rows; give an "
                f"id below {rows}, or processor=… so that the token is added."
            )
        if added if initialize_token is None else initialize_token:
            restore["rows"] = make_rows(inner, config, vocab.voco_id, known)
        elif vocab.voco_id >= rows:
            restore["rows"] = make_rows(inner, config, vocab.voco_id, known)
        register()
        state = Attachment(config, vocab, family, processor)
        state.restore = restore
        if config.makes_embeddings:
            state.embeddings = _block_embeddings(inner, config)
        text.config._attn_implementation_internal = name
        inner.__class__ = _extended(type(inner))
        object.__setattr__(inner, ATTRIBUTE, state)
        state.install(inner)
        state.handles += mend_llama4(inner)
    except Exception:
        if hasattr(inner, NAME):
            delattr(inner, NAME)
        if "rows" in restore:
            restore_rows(inner, restore["rows"])
        if added:
            remove_token(processor, config.token)
        raise
    return model


def detach(model: torch.nn.Module) -> torch.nn.Module:
    """Give back the model as it was before :func:`attach`, in place: class, attention, forward, embedding
    rows.

    Weights that training changed stay as they are; the VoCo token's row and id go. Returns the same object.
    """
    inner = unwrap(model)
    state = attachment(inner)
    state.remove()
    text = state.family.text_model(inner)
    text.config._attn_implementation_internal = state.restore["implementation"]
    inner.__class__ = state.restore["class"]
    object.__delattr__(inner, ATTRIBUTE)
    if state.embeddings is not None:
        delattr(inner, NAME)
    if "rows" in state.restore:
        restore_rows(inner, state.restore["rows"])
    if state.restore.get("token"):
        remove_token(state.processor, state.restore["token"])
    return model


def _block_embeddings(model: torch.nn.Module, config: VoCoConfig) -> BlockEmbeddings:
    """Give ``model`` the compressor that ``config`` names, with new weights."""
    weight = model.get_input_embeddings().weight
    made = build_compressor(config, model.config.get_text_config().hidden_size)
    model.add_module(NAME, made.to(weight.device, weight.dtype))
    return BlockEmbeddings(model)


def _extended(cls: type) -> type:
    """A subclass of ``cls`` with the two-stage methods, under the same name (so that a checkpoint names
    ``cls``).
    """
    if cls not in _CLASSES:

        @functools.wraps(cls.forward)
        def forward(self, *args: Any, voco_cache: Any = None, **kwargs: Any) -> Any:
            return VoCoGenerationMixin.forward(self, *args, voco_cache=voco_cache, **kwargs)

        # generate and Trainer read the argument names off the signature: the model's own, and voco_cache
        own = inspect.signature(cls.forward)
        extra = inspect.Parameter("voco_cache", inspect.Parameter.KEYWORD_ONLY, default=None)
        at = sum(p.kind is not inspect.Parameter.VAR_KEYWORD for p in own.parameters.values())
        parameters = list(own.parameters.values())
        forward.__signature__ = own.replace(parameters=[*parameters[:at], extra, *parameters[at:]])  # type: ignore
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
        _CLASSES[cls] = type(cls.__name__, (VoCoGenerationMixin, cls), names)
    return _CLASSES[cls]
