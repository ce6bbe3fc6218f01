"""Tokens that a caller added to the tokenizer: the model must have their rows, and a checkpoint must hold
them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.attachment import attachment, unwrap
from ..core.layout import tokenizer_of
from ..models.token_rows import embedding_rows


def check_added_tokens(model: nn.Module, processor: Any, adapted: bool) -> None:
    """Refuse tokens that were added after :func:`~voco_plugin.attach` and have no row, and rows that a
    checkpoint would lose: an adapter's holds the VoCo token's, and all others are the base model's on disk.

    Args:
        model: attached.
        adapted: whether an adapter trains, so that the base model is not saved.

    Raises:
        ValueError: it names a token.
    """
    state, inner = attachment(model), unwrap(model)
    rows = embedding_rows(inner)
    added: dict[str, int] = getattr(tokenizer_of(processor), "get_added_vocab", dict)()
    found = sorted((number, token) for token, number in added.items() if token != state.config.token)
    known = state.restore.get("known", set(added))
    beyond = [(number, token) for number, token in found if number >= rows and token not in known]
    if beyond:
        number, token = beyond[0]
        raise ValueError(
            f"the tokenizer has {token!r} (id {number}), and the model {rows} embedding rows; call "
            f"model.resize_token_embeddings({beyond[-1][0] + 1}), or take the token out."
        )
    if not adapted:
        return
    record = state.restore.get("rows") or {}
    before = record["rows"] if record.get("resized") else rows
    on_disk = min(before, _rows_on_disk(inner, before))
    for number, token in found:
        # a known token without a row of its own gets one where the model is attached, here and when loaded
        if on_disk <= number < (before if token in known else rows):
            raise ValueError(
                f"the token {token!r} (id {number}) was added to a base model of {on_disk} rows, and an "
                "adapter's checkpoint holds no row but the VoCo token's: loaded, it would be another; save "
                "the model and its processor with that token (save_pretrained), and train from that folder."
            )


def _rows_on_disk(model: Any, otherwise: int) -> int:
    """Embedding rows of the base model where it was loaded from, or ``otherwise`` where that cannot be
    told.
    """
    from transformers import AutoConfig

    try:
        saved = AutoConfig.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError):  # made in memory, or of a class that is not known here
        return otherwise
    return getattr(saved.get_text_config(), "vocab_size", otherwise)
