"""``log_likelihood``: how likely a model finds given continuations of a prompt, over images or their caches.

    prompt          P P P P            read once, for all of its continuations
    continuations           a a .      each goes on from a fork of the prompt's KV cache
                            b . .      (padded on the right: nothing that counts sees padding)
                            c c c

Shapes: ``B`` prompts read together, ``R`` continuations read together, ``T`` tokens of the longest of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..cache import VoCoCache
from ..core.attachment import attachment, evaluating, input_device, is_attached
from ..core.forward import as_cache, cache_of
from ..core.layout import tokenizer_of
from .answering import Tick, inputs_of
from .messages import conversations
from .prompts import Messages, adds_special_tokens, render

_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_IMAGE_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class Scored(NamedTuple):
    """What one continuation gets.

    Attributes:
        log_likelihood: the sum of its tokens' log-probabilities, in nats.
        is_greedy: whether each of its tokens is the likeliest one where it stands.
    """

    log_likelihood: float
    is_greedy: bool


@torch.no_grad()
def log_likelihood(
    model: Any,
    processor: Any,
    prompts: Sequence[str | Messages],
    continuations: Sequence[Sequence[str]],
    *,
    caches: Sequence[VoCoCache] | None = None,
    images: Sequence[Sequence[Any]] | None = None,
    batch_size: int = 8,
    tick: Tick | None = None,
) -> list[list[Scored]]:
    """The log-likelihood of each continuation of each prompt, as harnesses score multiple choice.

    A prompt is read once, whatever the number of its continuations. Prompts over images are batched; those
    without images, and all prompts of a plain model, are read one by one. Rows of a batch do not change one
    another.

    **Where a continuation begins.** Prompt (after the chat template, up to where the answer begins) and
    continuation are tokenized together, as one text; the continuation's tokens are those from where the
    whole differs from the prompt alone. Spaces at the prompt's end count to the continuation (``"Answer: "``
    + ``"yes"`` scores `` yes``), as in lm-evaluation-harness; line breaks do not, since chat templates end
    with one. Nothing is added: end tokens count where the continuation has them (``"yes</s>"``). Where the
    processor itself writes something after the prompt (PaliGemma's line break), the continuation is
    tokenized by itself.

    A compressor that reads the question reads the prompt, and no continuation.

    Args:
        prompts: per prompt a question, which stands after its images, or chat messages (see
            :func:`~voco_plugin.inference.answering.answer`).
        continuations: per prompt a list of texts, of any lengths.
        caches: per prompt the cache of its images (two stages).
        images: per prompt its images, in one pass; a model whose stage 1 is frozen compresses them first.
        batch_size: prompts, and continuations, that one forward reads.
        tick: called with the number of prompts just done.

    Returns:
        per prompt a :class:`Scored` for each continuation, in order.

    Raises:
        ValueError: the lists do not match, a continuation is empty or holds an image or VoCo token, a plain
            model is given caches, or a prompt ends with an image.
    """
    prompts, continuations = _listed(prompts), _listed(continuations)
    _check(prompts, continuations, batch_size)
    if caches is not None and not is_attached(model):
        raise ValueError("a model without VoCo attached cannot read a cache; load it with voco_plugin.load.")
    talks, shown = conversations(prompts, images, caches, processor=processor)
    work = [
        _tokenized(processor, talk, endings, f"prompt {number}") if len(endings) else None
        for number, (talk, endings) in enumerate(zip(talks, continuations, strict=True))
    ]
    _check_ids(model, work)
    out: list[list[Scored]] = [[] for _ in talks]
    with evaluating(model):
        for numbers in _batches(model, work, shown, caches, batch_size):
            inputs = _inputs(model, processor, numbers, talks, shown, caches)
            found = _score(model, inputs, [one for n in numbers if (one := work[n])], numbers, batch_size)
            for number, scores in zip(numbers, found, strict=True):
                out[number] = scores
            if tick is not None:
                tick(len(numbers))
    return out


# -- words → tokens


@dataclass
class _Ending:
    """A continuation's tokens behind what is read of its prompt.

    Attributes:
        ids: what follows the prompt that is read.
        skip: how many of them still belong to the prompt.
    """

    ids: list[int]
    skip: int = 0


@dataclass
class _Work:
    """One prompt and its continuations.

    Attributes:
        last: the last token of the prompt.
        drop: how many tokens of its end are not read with it, since a continuation changes them.
        endings: its continuations.
        alone: what they are if they are tokenized by themselves.
    """

    last: int
    drop: int
    endings: list[_Ending]
    alone: list[_Ending]


def _tokenized(processor: Any, talk: Messages, endings: Sequence[str], name: str) -> _Work:
    """Where each continuation begins: where the tokens of prompt and continuation leave those of the prompt,
    or of the prompt without the spaces at its end.
    """
    (text,) = render(processor, [talk])
    tokenizer, special = tokenizer_of(processor), adds_special_tokens(processor, [text])

    def tokenized(*texts: str, special: bool = special) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=special)["input_ids"]

    prompt, bare, *wholes = tokenized(text, text.rstrip(" "), *(text + ending for ending in endings))
    most = _common(prompt, bare)
    begins = [min(_common(whole, prompt), most) for whole in wholes]
    start = min(begins)
    made = [_Ending(whole[start:], at - start) for whole, at in zip(wholes, begins, strict=True)]
    alone = [_Ending(ids) for ids in tokenized(*endings, special=False)]
    for ending, one, other in zip(endings, made, alone, strict=True):
        if len(one.ids) <= one.skip or not other.ids:
            raise ValueError(f"{name}: the continuation {ending!r} has no token to score; leave it out.")
    return _Work(prompt[-1], len(prompt) - start, made, alone)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _listed(items: Any) -> Any:
    """What an iterable gives; one prompt that stands in the place of several stays what it is."""
    return items if isinstance(items, (str, dict)) else list(items)


def _check(prompts: Any, continuations: Any, batch_size: int) -> None:
    """Refuse lists that do not match.

    Raises:
        ValueError: one prompt or one continuation stands where a list is wanted, or their numbers differ.
    """
    if isinstance(prompts, (str, dict)) or (len(prompts) and isinstance(prompts[0], dict)):
        raise ValueError("prompts is one prompt; give a list of prompts: [prompt].")
    if isinstance(continuations, str) or len(continuations) != len(prompts):
        count = "one string" if isinstance(continuations, str) else f"{len(continuations)} list(s)"
        raise ValueError(
            f"continuations is {count} for {len(prompts)} prompt(s); give a list of continuations for each "
            "prompt: [[continuation, …], …]."
        )
    for number, endings in enumerate(continuations):
        if isinstance(endings, str):
            raise ValueError(f"continuations[{number}] is one string; give a list: [{endings!r}].")
        for ending in endings:
            if not isinstance(ending, str) or not ending:
                raise ValueError(
                    f"prompt {number}: the continuation {ending!r} has nothing to score; give text."
                )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")


def _check_ids(model: Any, work: Sequence[_Work | None]) -> None:
    """Refuse continuations that would be read as images."""
    refused: set[Any] = {getattr(model.config, name, None) for name in _IMAGE_IDS} - {None}
    if is_attached(model):
        vocab = attachment(model).vocab
        refused = {vocab.voco_id, *vocab.placeholders}
    for number, one in enumerate(work):
        for ending in [] if one is None else one.endings:
            found = refused.intersection(ending.ids)
            if found:
                raise ValueError(
                    f"prompt {number}: a continuation holds the image or VoCo token {min(found)}; "
                    "continuations are text."
                )


# -- tokens → scores


def _batches(
    model: Any, work: Sequence[_Work | None], shown: Any, caches: Any, batch_size: int
) -> list[list[int]]:
    """The numbers of the prompts that are read together. Rows of different lengths need the positions that
    the rule gives them, so whatever is read without it is read alone.
    """
    asked = [number for number, one in enumerate(work) if one is not None]
    ruled = caches is not None or (is_attached(model) and attachment(model).config.rule != "causal")
    together = [n for n in asked if ruled and (caches is not None or (shown is not None and shown[n]))]
    alone = [[n] for n in asked if n not in set(together)]
    batched = [together[start : start + batch_size] for start in range(0, len(together), batch_size)]
    return batched + alone


def _inputs(
    model: Any, processor: Any, numbers: list[int], talks: Sequence[Messages], shown: Any, caches: Any
) -> dict[str, Any]:
    """Arguments of the forward that reads the prompts."""

    def chosen(items: Any) -> Any:
        return None if items is None else [items[n] for n in numbers]

    inputs = inputs_of(model, processor, [talks[n] for n in numbers], chosen(shown), chosen(caches))
    vision = shown is not None and any(shown[n] for n in numbers)
    if vision and is_attached(model) and attachment(model).config.frozen_stage1:  # which one pass cannot do
        return {**model.stream_inputs(inputs), "voco_cache": model.compress(**inputs)}
    return inputs


def _score(
    model: Any, inputs: dict[str, Any], work: list[_Work], numbers: list[int], batch_size: int
) -> list[list[Scored]]:
    """The scores of ``B`` prompts' continuations.

    Args:
        numbers: of the prompts, for errors.
    """
    last = inputs["input_ids"][:, -1].tolist()
    same = [one.last == token for one, token in zip(work, last, strict=True)]
    drops = [one.drop if is_same else 0 for one, is_same in zip(work, same, strict=True)]
    endings = [one.endings if is_same else one.alone for one, is_same in zip(work, same, strict=True)]
    output = model(**_without_ends(inputs, drops), use_cache=True, logits_to_keep=1)
    first, past = output.logits[:, -1], cache_of(output)
    bad = (~first.isfinite()).any(dim=-1).tolist()
    if any(bad):
        raise ValueError(
            f"prompt {numbers[bad.index(True)]}: its last token gives no logits: it ends with an image, or "
            "the model computes no finite numbers; put text after the image."
        )
    rows = [(b, j) for b, listed in enumerate(endings) for j in range(len(listed))]
    found = {}
    for b, j in rows:
        one = endings[b][j]
        found[b, j] = _judged(first[b : b + 1], one.ids[:1]) if not one.skip else (0.0, True)
    longer = sorted(
        (r for r in rows if len(endings[r[0]][r[1]].ids) > 1), key=lambda r: -len(endings[r[0]][r[1]].ids)
    )
    for start in range(0, len(longer), batch_size):
        part = longer[start : start + batch_size]
        listed = [endings[b][j] for b, j in part]
        logits = _read(model, _forked(past, [b for b, _ in part]), [one.ids[:-1] for one in listed])
        for row, (key, one) in enumerate(zip(part, listed, strict=True)):
            begin = max(one.skip - 1, 0)
            total, greedy = _judged(logits[row, begin : len(one.ids) - 1], one.ids[begin + 1 :])
            found[key] = (found[key][0] + total, found[key][1] and greedy)
    return [[Scored(*found[b, j]) for j in range(len(listed))] for b, listed in enumerate(endings)]


def _judged(logits: torch.Tensor, ids: list[int]) -> tuple[float, bool]:
    """The summed log-probability of ``ids`` ``(t,)`` under ``logits`` ``(t, vocabulary)``; whether each is
    the likeliest.
    """
    logits = logits.float()
    wanted = torch.tensor(ids, device=logits.device)
    chosen = logits.log_softmax(dim=-1).gather(1, wanted[:, None])
    return float(chosen.double().sum()), bool((logits.argmax(dim=-1) == wanted).all())


def _without_ends(inputs: dict[str, Any], drops: list[int]) -> dict[str, Any]:
    """Rows without their last ``drops`` tokens, padded on the left."""
    if not any(drops):
        return inputs
    out = dict(inputs)
    for name in _PER_TOKEN:
        if name in inputs:
            out[name] = torch.stack([row.roll(by) for row, by in zip(inputs[name], drops, strict=True)])
    for row, by in enumerate(drops):
        out["attention_mask"][row, :by] = 0
    least = min(drops)  # columns that no row needs any more
    for name in _PER_TOKEN:
        if name in inputs:
            out[name] = out[name][:, least:]
    return out


def _forked(past: Any, rows: list[int]) -> Any:
    """A KV cache of its own for each of ``rows``; ``past`` stays as it is."""
    fork = copy.copy(past)
    fork.layers = [copy.copy(layer) for layer in past.layers]
    fork.batch_select_indices(torch.tensor(rows))  # on the CPU: layers may be on several devices
    return fork


def _read(model: Any, past: Any, rows: list[list[int]]) -> torch.Tensor:
    """Logits ``(R, T, vocabulary)`` of ``rows`` behind ``past``."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=input_device(model))
    return model(input_ids=ids, use_cache=True, **as_cache(past)).logits


__all__ = ["Scored", "log_likelihood"]
