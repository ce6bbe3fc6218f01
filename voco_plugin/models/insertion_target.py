"""Whose VoCo tokens are put in, and how many: read off an attached model, or off a config and a processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import VoCoConfig
from ..core.attachment import attachment, unwrap
from ..core.layout import TokenVocabulary, plain_processor, tokenizer_of
from .families import vocabulary_for


@dataclass(frozen=True)
class InsertionTarget:
    """What VoCo tokens are put in by.

    Attributes:
        config: the model's own, so that a K that is set there later counts here too.
        vocab: the ids by which sequences are read.
        named: whether the tokenizer knows the token; it must then go on doing so.
    """

    config: VoCoConfig
    vocab: TokenVocabulary
    named: bool

    @classmethod
    def of(cls, model_or_config: Any, processor: Any) -> InsertionTarget:
        """The target of an attached model, wrapped or not, or of a config (or a dict of one).

        Args:
            processor: whose tokenizer must have the token; ``None`` takes the one that the model was attached
                with.

        Raises:
            ValueError: neither a model nor a config, the model is not attached, or the tokenizer does not
                have the VoCo token (at the model's id).
        """
        if isinstance(model_or_config, Mapping):
            model_or_config = VoCoConfig.from_dict(dict(model_or_config))
        if isinstance(model_or_config, VoCoConfig):
            return cls._of_config(model_or_config, plain_processor(processor))
        if not hasattr(unwrap(model_or_config), "config"):
            raise ValueError(
                f"{model_or_config!r:.80} is neither an attached model nor a VoCoConfig; give one of them."
            )
        state = attachment(model_or_config)
        processor = state.processor if processor is None else plain_processor(processor)
        found = None if processor is None else _id_of(processor, state.config.token)
        if found != state.vocab.voco_id and (found is not None or state.processor is not None):
            has = "no such token" if found is None else f"it at id {found}"
            raise ValueError(
                f"the model's VoCo token {state.config.token!r} is id {state.vocab.voco_id}, and this "
                f"processor's tokenizer has {has}; give the processor that the model was attached with."
            )
        return cls(state.config, state.vocab, found is not None)

    @classmethod
    def _of_config(cls, config: VoCoConfig, processor: Any) -> InsertionTarget:
        if processor is None:
            raise ValueError("a VoCoConfig alone does not say which ids to read; give processor=… too.")
        found = _id_of(processor, config.token)
        if found is None and config.token_id is None:
            raise ValueError(
                f"this processor's tokenizer has no VoCo token {config.token!r}; give the attached model "
                "(attach adds the token to its processor), or the processor that was saved with it."
            )
        if found is not None and config.token_id not in (None, found):
            raise ValueError(
                f"VoCoConfig.token_id={config.token_id}, but the tokenizer has {config.token!r} at {found}; "
                "leave token_id out, or give the token that stands at that id."
            )
        return cls(config, vocabulary_for(processor=processor, voco=config), found is not None)

    def check(self, processor: Any) -> None:
        """Refuse to put in a token that the tokenizer had and has no more.

        Raises:
            ValueError: the model was detached.
        """
        if self.named and _id_of(processor, self.config.token) != self.vocab.voco_id:
            raise ValueError(
                f"the tokenizer has no VoCo token {self.config.token!r} any more (the model was detached); "
                "use the ordinary processor, or attach again and make a new VoCoProcessor."
            )


def _id_of(processor: Any, token: str) -> int | None:
    """The id of ``token`` in the processor's tokenizer; ``None`` where it has none."""
    tokenizer = tokenizer_of(processor)
    if getattr(tokenizer, "get_vocab", None) is None:
        return None
    found = tokenizer.convert_tokens_to_ids(token)
    is_it = isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token
    return found if is_it else None
