"""How a request tells an engine in another process which blocks its prompt holds, and the salt that keeps
their prefixes apart. Needs nothing of this package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class PlacedBlock(NamedTuple):
    """A block in a prompt.

    Attributes:
        key: the store's key, 64 hex digits.
        at: index of its first VoCo token in the prompt's ids.
        block: which block of the key's cache; an image has one.
    """

    key: str
    at: int
    block: int = 0


def salt_of(blocks: Iterable[str | tuple[str, int]]) -> str:
    """The ``cache_salt`` of a prompt that holds ``blocks`` in this order.

    Args:
        blocks: keys, or pairs of a key and the index of a block of its cache.

    Returns:
        what the salt is or begins with: ``salt_of(keys) + ":" + TENANT`` keeps tenants apart as well.
    """
    named = [[block, 0] if isinstance(block, str) else list(block) for block in blocks]
    return "voco-" + hashlib.sha256(json.dumps(named).encode()).hexdigest()


def request_fields(placed: Sequence[PlacedBlock], tenant: str | None = None) -> dict[str, Any]:
    """What goes beside the prompt's ids into a request's body (``extra_body`` of OpenAI's client).

    Args:
        tenant: whose prefixes are kept apart from those of others; ``None`` for all.
    """
    salt = salt_of([(block.key, block.block) for block in placed])
    return {
        "cache_salt": salt if tenant is None else f"{salt}:{tenant}",
        "kv_transfer_params": {"voco": [block._asdict() for block in placed]},
    }


__all__ = ["PlacedBlock", "request_fields", "salt_of"]
