"""The VoCo token: an id in the tokenizer, a row in the embeddings, and both removed again.

``model`` is a transformers model without wrappers.
"""

from __future__ import annotations

from typing import Any

import torch

from .._compat import full_shape, gathered, is_partitioned
from ..config import VoCoConfig
from ..core.layout import tokenizer_of

_AT_ONCE = 4096
"""Rows whose copies in fp64 are in memory at a time."""


def add_token(processor: Any, config: VoCoConfig) -> tuple[int, bool]:
    """Add ``config.token`` to the processor's tokenizer as a special token: its id, and whether it was new.

    Raises:
        ValueError: the tokenizer gives the token another id than ``config.token_id`` names.
    """
    tokenizer = tokenizer_of(processor)
    new = config.token not in tokenizer.get_vocab()
    if new:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(config.token, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(config.token)
    if config.token_id is not None and config.token_id != token_id:
        raise ValueError(
            f"VoCoConfig.token_id={config.token_id}, but the tokenizer has {config.token!r} at {token_id}; "
            "leave token_id out, or give the token that stands at that id."
        )
    return token_id, new


def embedding_rows(model: Any) -> int:
    """How many rows the input embeddings have, also where ZeRO-3 has split them."""
    return full_shape(model.get_input_embeddings().weight)[0]


def make_rows(model: Any, config: VoCoConfig, token_id: int, known: int) -> dict[str, Any]:
    """Make sure row ``token_id`` exists in the embeddings and, where the token is new, initialise it.

    The row is the mean of the ``known`` existing rows plus seeded noise of a hundredth of their spread, so
    that it starts in distribution. A vocabulary padded to a multiple of 64 stays so; tied embeddings stay
    tied.

    Returns:
        what :func:`restore_rows` needs to give the original weights back, bit for bit.
    """
    before = embedding_rows(model)
    record: dict[str, Any] = {"rows": before, "token_id": token_id, "resized": token_id >= before}
    weights = _weights(model)
    if any(weight.is_meta for weight in weights):
        raise ValueError(
            f"the row of {config.token!r} cannot be written: the model's embeddings or head are offloaded "
            "(on the meta device); keep both on a device in device_map, or attach once to the model without "
            "offloading, save it, and load that."
        )
    if record["resized"]:
        multiple = 64 if before % 64 == 0 else None
        _resize(model, token_id + 1, pad_to_multiple_of=multiple)
        weights = _weights(model)
    known = min(known, before, token_id) or before
    generator = torch.Generator().manual_seed(config.token_seed)
    with torch.no_grad(), gathered(weights, write=True):
        if not record["resized"]:
            record["old"] = [weight[token_id].detach().clone() for weight in weights]
        try:
            for weight in weights:
                mean, std = _mean_and_std(weight[:known])
                noise = torch.randn(weight.shape[1], generator=generator).double() * std * 0.01
                row = (mean + noise).to(weight.dtype).to(weight.device)
                weight[token_id] = row
                if record["resized"]:
                    weight[before:token_id] = row  # ids between the old end and the token, if any
                    weight[token_id + 1 :] = row  # padding rows
        except BaseException:  # an interrupt: a row that was there has its values back
            for weight, old in zip(weights, record.get("old", ()), strict=False):
                weight[token_id] = old
            raise
    return record


def _mean_and_std(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each column of ``(n, d)``, ``(d,)`` each, summed in fp64 on the CPU: in fp32 one kind of CPU or GPU
    rounds otherwise than the next, and a cache of one machine would be another model's on the next.
    """
    total = torch.zeros(2, rows.shape[1], dtype=torch.float64)
    for part in rows.detach().split(_AT_ONCE):
        values = part.cpu().double()
        total[0] += values.sum(dim=0)
    mean = total[0] / rows.shape[0]
    for part in rows.detach().split(_AT_ONCE):
        total[1] += (part.cpu().double() - mean).square().sum(dim=0)
    return mean, (total[1] / rows.shape[0]).sqrt()


def _resize(model: Any, rows: int, **options: Any) -> None:
    """transformers' own, in the same modules and parameters, so that whatever was built on them holds still:
    an optimizer, an average of the weights, hooks. transformers makes a new head, in training mode.
    """
    ends = (model.get_input_embeddings, model.get_output_embeddings)
    before = [end() for end in ends]
    modes = [None if module is None else module.training for module in before]
    model.resize_token_embeddings(rows, mean_resizing=False, **options)
    old, new = before[1], model.get_output_embeddings()
    if old is not new and type(old) is type(new) and not _is_managed(old) and not _is_managed(new):
        for name, parameter in new.named_parameters(recurse=False):
            own = getattr(old, name)
            own.data, own.grad = parameter.data, None
        old.out_features = new.out_features
        model.set_output_embeddings(old)
    for end, mode in zip(ends, modes, strict=True):
        if mode is not None:
            end().train(mode)
            weight = end().weight
            if weight.grad is not None and weight.grad.shape != weight.shape:
                weight.grad = None


def _is_managed(module: Any) -> bool:
    """Whether another library keeps the weights of ``module``: accelerate's hooks, or ZeRO-3."""
    return hasattr(module, "_hf_hook") or is_partitioned(module.weight)


def _weights(model: Any) -> list[torch.Tensor]:
    """The input embedding's weight and, where it is another tensor, the LM head's."""
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    return weights


def restore_rows(model: Any, record: dict[str, Any]) -> None:
    """Undo :func:`make_rows`."""
    if record["resized"]:
        _resize(model, record["rows"])
        return
    weights = _weights(model)
    with torch.no_grad(), gathered(weights, write=True):
        for weight, old in zip(weights, record["old"], strict=True):
            weight[record["token_id"]] = old.to(weight.device)


def remove_token(processor: Any, token: str) -> None:
    """Take ``token`` out of the tokenizer again.

    Fast tokenizers cannot drop an added token, so the backend is rebuilt from its own JSON without it.
    """
    import json

    tokenizer = tokenizer_of(processor)
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is None:
        return
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state.get("added_tokens", []) if t["content"] != token]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
