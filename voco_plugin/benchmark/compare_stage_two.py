"""Stage 2 of a given model and processor, compared with what it replaces, on the same weights:

no cache      vision tower and every vision token again, for each question
full caching  the keys and values of every vision token kept: the honest baseline
VoCo          the keys and values of the VoCo tokens kept
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from ..core.forward import as_cache, cache_of
from .timing import interleaved_medians


def stage_two_times(
    plain: Any,
    attached: Any,
    processor: Any,
    images: Sequence[Any],
    questions: Sequence[str],
    repeats: int = 30,
) -> dict[str, float]:
    """Median seconds to the first answer token of one batch, image ``b`` with question ``b``.

    Args:
        plain: the model without VoCo.
        attached: the same weights with VoCo attached (what is timed does not depend on what was learnt).

    Returns:
        seconds by way: ``no cache``, ``full caching``, ``VoCo``.
    """
    import torch

    from ..inference.answering import compress_images, prompt

    with torch.no_grad():
        whole = prompt(plain, processor, questions, [[image] for image in images])
        past, rest = _cached_prefix(plain, processor, images, questions)
        caches = list(compress_images(attached, processor, images, batch_size=len(images)))
        stream = prompt(attached, processor, questions, caches=caches)

        def full() -> Callable[[], Any]:
            own = copy.deepcopy(past)  # a forward appends to it
            return lambda: plain(**rest, **as_cache(own), use_cache=True)

        ways = {
            "no cache": lambda: lambda: plain(**whole, use_cache=True),
            "full caching": full,
            "VoCo": lambda: lambda: attached(**stream),
        }
        return interleaved_medians(ways, repeats)


def _cached_prefix(
    plain: Any, processor: Any, images: Sequence[Any], questions: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """The plain model's KV cache of every prompt up to its image's last token, and the inputs that follow it.

    The prompts must begin alike and their images have the same number of tokens, so that no padding is
    cached.
    """
    import torch

    from ..inference.answering import prompt

    alone = [prompt(plain, processor, [q], [[i]]) for q, i in zip(questions, images, strict=True)]
    placeholder = plain.config.image_token_id
    ends = {int((one["input_ids"][0] == placeholder).nonzero().max()) + 1 for one in alone}
    if len(ends) != 1:
        raise ValueError("the images have different numbers of tokens; time images of one size.")
    end = ends.pop()
    pixels = {
        k: torch.cat([one[k] for one in alone]) for k in alone[0] if k not in ("input_ids", "attention_mask")
    }
    first = torch.cat([one["input_ids"][:, :end] for one in alone])
    past = cache_of(plain(input_ids=first, attention_mask=torch.ones_like(first), use_cache=True, **pixels))
    tails = [one["input_ids"][0, end:] for one in alone]
    ids = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tails], batch_first=True)
    return past, {"input_ids": ids, "attention_mask": torch.cat([torch.ones_like(first), real], dim=1)}
