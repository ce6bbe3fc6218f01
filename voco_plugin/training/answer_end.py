"""How the answers that are learnt end, and that the model stops there."""

from __future__ import annotations

import logging
from typing import Any

from ..core.attachment import unwrap
from ..models.answer_ends import answer_end, stop_at

logger = logging.getLogger(__name__)


def check_answer_end(model: Any, processor: Any, template: str | None = None, learns: bool = True) -> None:
    """Let ``model`` stop where the chat template that it is tuned with ends an answer; say where that is
    nowhere.

    Args:
        template: the trainer's, where it is another than the processor's.
        learns: whether the language model trains (a projector that is aligned teaches it nothing).
    """
    settings = getattr(unwrap(model), "generation_config", None)
    end = answer_end(processor, template or getattr(processor, "chat_template", None))
    if end is None or settings is None:
        return
    if end.token_id is None and learns:
        logger.warning(
            "the chat template ends an answer with %s, so a model tuned with it does not learn to stop; "
            "chat_template_path takes a shipped one that ends its answers (docs/training.md).",
            f"{end.text!r}, which is no token of this tokenizer" if end.text else "no token",
        )
    elif stop_at(settings, end.token_id):  # nothing where it is no token
        logger.warning(
            "the chat template ends an answer with %r: added to the tokens at which generation stops.",
            end.text,
        )
