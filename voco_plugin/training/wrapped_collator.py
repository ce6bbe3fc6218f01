"""``wrap_collator``: the batch of another framework's collator, with VoCo tokens in it.

Shapes: ``B`` rows, ``T`` tokens a row.

    rows → their collator → checked: every tensor with a value per token is known, or stated → VoCo tokens in
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..core.attachment import attachment, unwrap
from ..core.injection import insert_voco_tokens
from ..core.layout import pad_id_of, pad_id_of_model, padding_side_of, tokenizer_of
from ..models.insertion_target import InsertionTarget

_KNOWN = (
    "input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids", "completion_mask",
    "assistant_masks",
)  # fmt: skip
_NEEDED = ("input_ids", "attention_mask", "labels")
_PACKED = ("cu_seq", "max_length_", "max_seqlen", "seq_idx", "document_ids")
_COUNTS = ("length", "lengths", "seq_len", "seq_lens", "seq_lengths", "seqlens", "input_lengths")
_GRID = 3  # columns of a processor's sizes and grids, (images, 2 or 3)


def wrap_collator(
    collator: Callable[..., Any],
    model_or_config: Any,
    per_token: Mapping[str, float | None] | None = None,
    *,
    processor: Any = None,
    num_tokens: int | None = None,
    padding_side: str | None = None,
) -> WrappedCollator:
    """Another framework's collator, whose batches get VoCo tokens after each image.

    ``input_ids``, ``attention_mask``, ``labels`` (VoCo tokens are -100) and the type ids and masks of
    transformers follow by themselves. What else a batch has per token is stated, never guessed. The wrapped
    collator pickles, and its attributes are those of ``collator``.

    Args:
        collator: takes rows, gives a dict (or what transformers has for one) with ``input_ids`` ``(B, T)``.
        model_or_config: the attached model, wrapped or not, or the config; nothing of a model but its config
            and ids is kept.
        per_token: other tensors ``(B, T)`` or ``(B, T, …)`` by name, with what a VoCo token and padding get
            in each; ``None``: it is left out, and the model makes it anew (``position_ids`` of any shape).
        processor: the processor or tokenizer behind ``collator``; by default its own (``processor``,
            ``processing_class``, ``tokenizer``), else the one that the model was attached with.
        num_tokens: K; ``None`` takes the config's, as it is when a batch is made.
        padding_side: where rows are padded that are then shorter than others; ``None`` takes the side that
            the batch shows, and where it shows none, the tokenizer's.

    Raises:
        ValueError: here, that there is no VoCo token to put in, or that ``per_token`` names what follows by
            itself. For a batch: a tensor per token that is not stated, packed rows, counts of tokens, or no
            side to pad on. LayoutError as :func:`~voco_plugin.core.injection.insert_voco_tokens`.
    """
    return WrappedCollator(
        collator,
        model_or_config,
        per_token,
        processor=processor,
        num_tokens=num_tokens,
        padding_side=padding_side,
    )


class WrappedCollator:
    """What :func:`wrap_collator` gives."""

    def __init__(
        self,
        collator: Callable[..., Any],
        model_or_config: Any,
        per_token: Mapping[str, float | None] | None = None,
        *,
        processor: Any = None,
        num_tokens: int | None = None,
        padding_side: str | None = None,
    ) -> None:
        if not callable(collator):
            raise ValueError(f"{type(collator).__name__} is no collator: it cannot be called with rows.")
        per_token = dict(per_token or {})
        for name, fill in per_token.items():
            if name in _NEEDED or (name in _KNOWN and fill is not None):
                raise ValueError(f"per_token: {name!r} follows the VoCo tokens by itself; leave it out.")
            if fill is not None and (isinstance(fill, str) or not isinstance(fill, (int, float))):
                raise ValueError(f"per_token: {name!r} gets {fill!r}, which is no number; give one, or None.")
        if num_tokens is not None and (isinstance(num_tokens, bool) or not isinstance(num_tokens, int)):
            raise ValueError(f"num_tokens={num_tokens!r} must be a whole number of at least 1, or None.")
        if padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side={padding_side!r} is not known; use 'left' or 'right'.")
        self.collator, self.per_token, self.num_tokens = collator, per_token, num_tokens
        tools = processor if processor is not None else _processor_of(collator)
        self.target = InsertionTarget.of(model_or_config, tools)
        if tools is None:  # a model then: the target has refused a config alone
            tools = attachment(model_or_config).processor
        self.padding_side = padding_side or getattr(tokenizer_of(tools), "padding_side", None)
        self.pad_token_id = pad_id_of_model(unwrap(model_or_config)) if tools is None else pad_id_of(tools)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The batch of ``collator``, with VoCo tokens; see :func:`wrap_collator`."""
        batch = self.collator(*args, **kwargs)
        values = _checked_batch(batch, self.per_token)
        vocab, fills = self.target.vocab, {k: v for k, v in self.per_token.items() if v is not None}
        side = padding_side_of(values.get("attention_mask")) or self.padding_side
        made = insert_voco_tokens(
            values,
            vocab,
            self.num_tokens or self.target.config.num_tokens,
            pad_token_id=self.pad_token_id,
            padding_side=side or "right",
            fills=fills,
        )
        if side is None and not made["attention_mask"].bool().all():
            raise ValueError(
                "the rows were of one length and are no more, and nothing says on which side to pad them; "
                "give wrap_collator(…, padding_side='right') (or 'left')."
            )
        if made.get("labels") is not None:  # a batch that had its VoCo tokens may have them labelled
            made["labels"] = made["labels"].masked_fill(made["input_ids"] == vocab.voco_id, -100)
        return type(batch)(made) if _is_output(batch) else made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "collator" not in vars(self):  # being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __repr__(self) -> str:
        return f"wrap_collator({self.collator!r}, K={self.num_tokens or self.target.config.num_tokens})"


def _processor_of(collator: Any) -> Any:
    names = ("processor", "processing_class", "tokenizer")
    return next((found for name in names if (found := getattr(collator, name, None)) is not None), None)


def _is_output(batch: Any) -> bool:
    """Whether ``batch`` is what transformers' tokenizers and processors return: it has ``to``, a dict has
    none.
    """
    from transformers import BatchEncoding, BatchFeature

    return isinstance(batch, (BatchEncoding, BatchFeature))


def _checked_batch(batch: Any, per_token: Mapping[str, float | None]) -> dict[str, Any]:
    """A batch as a dict, without what is to be made anew.

    Raises:
        ValueError: it names what is not known to follow the VoCo tokens.
    """
    if not isinstance(batch, Mapping) and not _is_output(batch):
        raise ValueError(f"the collator gives a {type(batch).__name__}, not a dict with input_ids.")
    values = dict(batch)
    ids = values.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        has = f"a {type(ids).__name__}" if ids is not None else f"none, but {', '.join(values) or 'nothing'}"
        if isinstance(ids, torch.Tensor):
            has = f"a tensor of shape {tuple(ids.shape)}"
        raise ValueError(
            f"the collator's batch must have input_ids as a tensor (rows, tokens); it has {has}."
        )
    shape, mask = (ids.shape[0], ids.shape[1]), values.get("attention_mask")
    for name, value in list(values.items()):
        if name in per_token and per_token[name] is None:
            if name == "position_ids" and isinstance(value, torch.Tensor):
                _check_not_packed(value, mask)
            del values[name]
        elif name in per_token:
            _check_fill(name, value, per_token[name], shape)
        elif name.startswith(_PACKED):
            raise ValueError(
                f"the batch holds {name!r}: several conversations are packed into a row, which VoCo tokens "
                "cannot be put into; turn packing (padding_free) off."
            )
        elif name in _COUNTS:
            raise ValueError(
                f"the batch holds {name!r}, which counts tokens without the VoCo tokens; name it in "
                f"per_token (per_token={{{name!r}: None}} leaves it out)."
            )
        elif name not in _KNOWN and _is_per_token(name, value, shape):
            raise ValueError(
                f"the batch holds {name!r}, one value per token, and nothing says what a VoCo token gets "
                f"there; name it in per_token: {{{name!r}: 0}} (or another fill), or None to leave it out."
            )
    return values


def _is_per_token(name: str, value: Any, shape: tuple[int, int]) -> bool:
    """Whether ``value`` has one entry per token: ``(B, T, …)``, or ``(P, B, T)`` as positions of several axes
    are. Sizes and grids of a processor, 2 or 3 columns, are none, nor are pixels.
    """
    if name == "position_ids":
        return value is not None
    if isinstance(value, (list, tuple)):
        lengths = [len(row) for row in value if isinstance(row, (list, tuple, torch.Tensor)) and len(row)]
        return len(value) == shape[0] and lengths == [shape[1]] * shape[0] and shape[1] > _GRID
    found = getattr(value, "shape", None)
    if found is None or name.startswith("pixel_") or shape[1] <= _GRID:
        return False
    return tuple(found[:2]) == shape or (len(found) == 3 and tuple(found[1:]) == shape)


def _check_fill(name: str, value: Any, fill: float | None, shape: tuple[int, int]) -> None:
    if value is None:
        return
    if not isinstance(value, torch.Tensor) or tuple(value.shape[:2]) != shape:
        has = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
        raise ValueError(
            f"per_token: {name!r} must be a tensor that begins with the shape of input_ids, {shape}, not "
            f"{has}; {{{name!r}: None}} leaves it out."
        )
    if not value.is_floating_point() and fill not in (True, False) and fill != int(fill or 0):
        raise ValueError(
            f"per_token: {name!r} holds {value.dtype}, which {fill!r} is not; give a whole number."
        )


def _check_not_packed(positions: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Refuse positions ``(B, T)`` or ``(P, B, T)`` that begin anew within a row: without them the model would
    read its conversations as one.
    """
    rows = positions if positions.dim() == 2 else positions[0]
    real = torch.ones_like(rows, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask.bool()
    starts = ((rows == 0) & real.to(rows.device)).sum(1)
    after = (rows[:, 1:] == 0) & (rows[:, :-1] > 0) & real[:, 1:].to(rows.device)
    if bool((starts > 1).any()) and bool(after.any()):
        raise ValueError(
            "the batch's position_ids begin anew within a row: several conversations are packed into it, "
            "which VoCo tokens cannot be put into; turn packing (padding_free) off."
        )
