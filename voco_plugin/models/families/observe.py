"""Which tokens a processor puts around and between an image's placeholders, seen by running it once.

Processors name such tokens in many ways (row breaks, tile tags, column tags, end markers), or not at all;
what they write says it without a list of names. Only special or added tokens are taken: ordinary text next to
an image stays text.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

_SIDES = ((64, 64), (64, 160))  # pixels; a wide image is cut into tiles where the processor cuts


def observed_markers(processor: Any, placeholders: set[int]) -> tuple[set[int], set[int]]:
    """``(start markers, other markers)``: the special token that opens an image, and those between or right
    after its placeholders. Empty where the processor takes no image.
    """
    token = getattr(processor, "image_token", None)  # what stands for one image in a prompt
    token = getattr(token, "content", token)
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(token, str) or tokenizer is None or getattr(processor, "image_processor", None) is None:
        return set(), set()
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    text_only = {
        getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "pad", "unk", "sep", "cls")
    }
    starts: set[int] = set()
    others: set[int] = set()
    for side in _SIDES:
        ids = _run(processor, token, side)
        at = [i for i, t in enumerate(ids) if t in placeholders]
        if not at:
            continue
        allowed = special - text_only - placeholders
        others |= {t for t in ids[at[0] : at[-1]] if t in allowed}
        first, after = at[0], at[-1] + 1
        while first > 0 and ids[first - 1] in allowed:
            first -= 1
        others |= set(ids[first + 1 : at[0]])
        if first < at[0]:  # the outermost opens the image
            starts.add(ids[first])
        while after < len(ids) and ids[after] in allowed:
            others.add(ids[after])
            after += 1
    return starts - others, others


def _run(processor: Any, token: str, side: tuple[int, int]) -> list[int]:
    from PIL import Image

    try:
        made = processor(images=[Image.new("RGB", side)], text=[f"a {token} a"])
        ids = made["input_ids"][0]
    except Exception as error:  # a processor of another calling convention: its names are all there is
        logger.debug("%s could not be observed: %s", type(processor).__name__, error)
        return []
    return [int(i) for i in ids]
