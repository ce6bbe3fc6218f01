"""What a request carries: which blocks its prompt holds and where, and a salt that covers them.

    {"prompt": [1, 5, 7, 7, 9], "cache_salt": "voco-…", "kv_transfer_params":
        {"voco": [{"key": "64 hex digits", "at": 2}]}}        7 is the VoCo token, the block has K = 2

The salt is there because vLLM's prefix cache knows a prompt by its ids and its salt: two images in one prompt
would share what was computed of either. Nothing here needs vLLM: a front makes its requests with
:func:`request_fields`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from voco_plugin.cache.engine_request import PlacedBlock, request_fields, salt_of

_KEY = re.compile(r"[0-9a-f]{64}")
_FIELDS = ("key", "at", "block")


class RequestRefused(ValueError):
    """A request that is not answered; the message is for whoever sent it."""


def blocks_of_request(
    ids: Sequence[int] | None,
    params: Mapping[str, Any] | None,
    salt: str | None,
    voco_id: int,
    image_ids: Iterable[int],
) -> tuple[PlacedBlock, ...]:
    """The blocks that a request names, in order; none for a prompt of text alone.

    Args:
        ids: of the prompt; ``None`` where it comes as embeddings.
        params: the request's ``kv_transfer_params``.
        salt: its ``cache_salt``.
        image_ids: ids that no prompt of text and VoCo tokens holds.

    Raises:
        RequestRefused: it cannot be answered as it is.
    """
    if params is not None and not isinstance(params, Mapping):
        raise RequestRefused(f"kv_transfer_params={params!r:.80} is not an object.")
    named = (params or {}).get("voco")
    if named is not None and not isinstance(named, list):
        raise RequestRefused(f"voco={named!r:.80} is not a list of blocks.")
    if ids is None:
        if named:
            raise RequestRefused(
                "the prompt is given as embeddings, where no VoCo token can be found; send token ids."
            )
        return ()
    image = next((token for token in image_ids if token in ids), None)
    if image is not None:
        raise RequestRefused(
            f"position {list(ids).index(image)} of the prompt holds {image}, the id of a vision token; send "
            "text and VoCo tokens alone."
        )
    if voco_id not in ids:
        if named:
            raise RequestRefused(
                f"kv_transfer_params names {len(named)} block(s), but the prompt holds no VoCo token "
                f"(id {voco_id}); put K of them where each block stands."
            )
        return ()
    if not named:
        raise RequestRefused(
            f"position {list(ids).index(voco_id)} of the prompt holds a VoCo token, but the request names no "
            'block; name them: kv_transfer_params={"voco": [{"key": …, "at": …}]}.'
        )
    placed = tuple(_read(number, entry) for number, entry in enumerate(named))
    _check_places(placed, ids, voco_id)
    _check_salt(placed, salt)
    if ids[-1] == voco_id:
        raise RequestRefused(
            "the prompt ends with a block, and its answer would follow from a VoCo token that was read when "
            "the image was compressed; put text after it."
        )
    return placed


def _read(number: int, entry: Any) -> PlacedBlock:
    if not isinstance(entry, Mapping):
        raise RequestRefused(f'block {number}: {entry!r:.80} is not an object with "key" and "at".')
    unknown = [name for name in entry if name not in _FIELDS]
    if unknown:
        raise RequestRefused(
            f"block {number}: {unknown[0]!r:.80} is unknown; there are {', '.join(_FIELDS)}."
        )
    key, at, block = entry.get("key"), entry.get("at"), entry.get("block", 0)
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise RequestRefused(f"block {number}: key={key!r:.80} is not a key; a key is 64 hex digits.")
    for name, value in (("at", at), ("block", block)):
        if type(value) is not int or value < 0:
            raise RequestRefused(f"block {number}: {name}={value!r:.80} is not an integer of 0 or more.")
    return PlacedBlock(key, at, block)  # type: ignore[arg-type]


def _check_places(placed: Sequence[PlacedBlock], ids: Sequence[int], voco_id: int) -> None:
    before = -1
    for number, block in enumerate(placed):
        if block.at <= before:
            raise RequestRefused(
                f"block {number}: at={block.at} is not after block {number - 1} at {before}; name blocks in "
                "the order of the prompt."
            )
        if block.at >= len(ids) or ids[block.at] != voco_id:
            raise RequestRefused(
                f"block {number}: no VoCo token (id {voco_id}) stands at {block.at} of the prompt's "
                f"{len(ids)} ids."
            )
        before = block.at


def _check_salt(placed: Sequence[PlacedBlock], salt: str | None) -> None:
    wanted = salt_of([(block.key, block.block) for block in placed])
    if salt is None or (salt != wanted and not salt.startswith(f"{wanted}:")):
        raise RequestRefused(
            f"cache_salt={salt!r:.100} does not cover the blocks, so that another image's answer could come "
            f"out of the prefix cache; send {wanted!r} (salt_of)."
        )


def check_tokens(
    placed: Sequence[PlacedBlock], tokens: Sequence[int], ids: Sequence[int], voco_id: int
) -> None:
    """Refuse blocks that do not cover the prompt's VoCo tokens one by one.

    Args:
        tokens: K of each block.

    Raises:
        RequestRefused: a block is of another K than its place has room for, or a VoCo token has no block.
    """
    places = [place for place, token in enumerate(ids) if token == voco_id]
    covered = [at + i for (_, at, _), count in zip(placed, tokens, strict=True) for i in range(count)]
    if covered == places:
        return
    for number, (block, count) in enumerate(zip(placed, tokens, strict=True)):
        end = placed[number + 1].at if number + 1 < len(placed) else len(ids)
        room = sum(block.at <= place < end for place in places)
        if room != count or ids[block.at + count - 1] != voco_id:
            raise RequestRefused(
                f"block {number} ({block.key[:8]}…, {block.block}) has K={count}, but {room} VoCo tokens "
                f"stand for it from {block.at} on; put exactly K, one after the other."
            )
    raise RequestRefused(f"the VoCo token at {places[0]} of the prompt has no block; name one for each run.")


__all__ = [
    "PlacedBlock",
    "RequestRefused",
    "blocks_of_request",
    "check_tokens",
    "request_fields",
    "salt_of",
]
