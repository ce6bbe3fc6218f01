"""What :func:`voco_plugin.attach` gives a model, and how it is found again through PEFT, DDP, DeepSpeed, FSDP
and ``torch.compile`` wrappers.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from ..config import VoCoConfig
from .block_embeddings import BlockEmbeddings
from .layout import TokenVocabulary

ATTRIBUTE = "_voco_attachment"
"""Where an attached model keeps its :class:`Attachment`."""


class ModelFacts(Protocol):
    """What a forward has to know of a family of models; :class:`~voco_plugin.models.families.Family` says
    it.
    """

    prefix_lm: bool
    images_by_row: bool

    def backbone(self, model: torch.nn.Module) -> torch.nn.Module: ...

    def text_model(self, model: torch.nn.Module) -> torch.nn.Module: ...

    def merged_at(self, model: torch.nn.Module) -> tuple[torch.nn.Module, bool]: ...

    def chunk_size(self, model: torch.nn.Module) -> int | None: ...

    def windowed(self, model: torch.nn.Module) -> bool: ...

    def prefix(self, token_types: torch.Tensor) -> torch.Tensor: ...

    def sequential(
        self,
        backbone: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        vision: dict[str, Any],
    ) -> torch.Tensor: ...

    def sequential_of_text(self, backbone: torch.nn.Module, attention_mask: torch.Tensor) -> torch.Tensor: ...

    def shape_positions(self, backbone: torch.nn.Module, positions: torch.Tensor) -> torch.Tensor: ...


class Attachment:
    """What an attached model knows of itself. Nothing of a single forward is kept here.

    Attributes:
        config: the :class:`~voco_plugin.config.VoCoConfig` in force.
        vocab: the ids by which sequences are read.
        family: the model's :class:`~voco_plugin.models.families.base.Family`.
        processor: the processor given to ``attach``, or ``None``.
        embeddings: what makes the VoCo tokens' input embeddings; ``None`` where they are the token's row.
        restore: what ``detach`` gives back.
        relocator: what moves cached keys, once it is needed (:mod:`~voco_plugin.cache.place.relocation`).
        detached: whether it did; a shallow copy of the model, which shares its submodules, then has no rule.
    """

    def __init__(
        self, config: VoCoConfig, vocab: TokenVocabulary, family: ModelFacts, processor: Any
    ) -> None:
        self.config, self.vocab, self.family, self.processor = config, vocab, family, processor
        self.embeddings: BlockEmbeddings | None = None
        self.restore: dict[str, Any] = {}
        self.detached = False
        self.relocator: Any = None

    def __repr__(self) -> str:
        config, family = self.config, type(self.family).__name__
        return (
            f"Attachment({family}, rule={config.rule!r}, K={config.num_tokens}, "
            f"positions={config.positions!r}, VoCo token {config.token!r} = {self.vocab.voco_id})"
        )

    def __deepcopy__(self, memo: dict) -> Attachment:
        made = Attachment(copy.copy(self.config), self.vocab, self.family, self.processor)
        memo[id(self)] = made
        made.restore = copy.deepcopy(self.restore, memo)
        made.embeddings = copy.deepcopy(self.embeddings, memo)
        return made

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``voco_config.json``: the rule, the ids it is read by, and whether the token's row was made
        here.

        An adapter's checkpoint holds the trained input row only; whoever loads it onto the same base makes
        the other row (the LM head's) anew from the same seed.
        """
        return self.config.save(folder, vocabulary=self.vocab.to_dict(), row_made="rows" in self.restore)

    def check_attached(self) -> None:
        """Refuse what was taken off.

        Raises:
            ValueError: the model that this one is a shallow copy of was detached.
        """
        if self.detached:
            raise ValueError(
                "this is a shallow copy (copy.copy) of a model that was detached, and shares its submodules; "
                "use that model, or copy.deepcopy before it is detached."
            )

    def check_reusable(self, what: str) -> None:
        """Refuse to cache what was made for one question.

        Raises:
            ValueError: the compressor reads the question.
        """
        if self.embeddings is not None and self.embeddings.compressor.reads_question:
            raise ValueError(
                f"{what}: compressor={self.config.compressor!r} reads the question before it compresses, so "
                "a cache would answer other questions wrongly; ask with the image in the prompt."
            )


def unwrap(model: Any) -> torch.nn.Module:
    """The transformers model inside PEFT, DDP, FSDP, DeepSpeed or ``torch.compile`` wrappers."""
    from transformers import PreTrainedModel

    seen = model
    while not isinstance(seen, PreTrainedModel):
        if isinstance(getattr(seen, "_orig_mod", None), torch.nn.Module):
            seen = seen._orig_mod
        elif hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()
        elif isinstance(getattr(seen, "module", None), torch.nn.Module):
            seen = seen.module
        else:
            break
    return seen


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs: the device of its embeddings, or, where accelerate keeps these
    elsewhere between forwards, the one that they run on.
    """
    embedding = model.get_input_embeddings()
    hook = vars(embedding).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    return embedding.weight.device


def is_attached(model: Any) -> bool:
    """Whether ``model`` (or the model inside its wrappers) has the rule on."""
    found = getattr(unwrap(model), ATTRIBUTE, None)
    return found is not None and not found.detached


def attachment(model: Any) -> Attachment:
    """The :class:`Attachment` of a model, also through its wrappers.

    Raises:
        ValueError: the model is not attached.
    """
    found = getattr(unwrap(model), ATTRIBUTE, None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no VoCo attached; call voco_plugin.attach(model, config) first."
        )
    found.check_attached()
    return found


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module is in the mode it was in.

    Only the flags are set: ``PreTrainedModel.eval`` would also exchange kernels, and ``train`` would put
    modules that were in evaluation mode (a frozen tower) into training mode.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
