"""Keys of a store: 64 hex digits, over exactly what an image's block depends on."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from ..cache.container import VoCoCacheError
from ..cache.fingerprint import as_reader, block_fingerprint, compared, differences
from ..data.images import open_image

_KEY = re.compile(r"[0-9a-f]{64}")
_NOT_OF_THE_STORE = ("num_tokens", "attention")
_REMEMBERED = 100_000


def image_key(image: Any, made_by: dict[str, Any], num_tokens: int | None = None) -> str:
    """sha256 over the decoded pixels, the fingerprint (model, adapter, processor, rule, dtype) and K.

    Args:
        image: whatever :func:`~voco_plugin.data.images.open_image` opens; a PIL image that it has
            opened gives the same key as its file.
        made_by: the fingerprint of the model that compresses it.
        num_tokens: K; the fingerprint's own where left out.

    Raises:
        BadImageError: the image cannot be read.
        ValueError: neither ``num_tokens`` nor the fingerprint says K.
    """
    tokens = made_by.get("num_tokens") if num_tokens is None else num_tokens
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"num_tokens={tokens!r}: a key needs the number of VoCo tokens, 1 or more.")
    opened = open_image(image)
    facts = {"made_by": of_the_store(made_by), "num_tokens": tokens, "mode": opened.mode, "size": opened.size}
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    sha.update(b"\n")
    sha.update(opened.tobytes())
    return sha.hexdigest()


def of_the_store(made_by: dict[str, Any]) -> dict[str, Any]:
    """What all blocks of a store share: the fingerprint without K, and without how a prefix-LM attended,
    which is known from a block only.
    """
    return {name: value for name, value in made_by.items() if name not in _NOT_OF_THE_STORE}


def key_bytes(key: str) -> bytes:
    """The 32 bytes of a key.

    Raises:
        VoCoCacheError: it is not 64 hex digits: nothing a user typed becomes a key or a path.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise VoCoCacheError(f"{str(key)[:80]!r} is no key; a key is the 64 hex digits of image_key.")
    return bytes.fromhex(key)


class KeysGiven:
    """The K of keys that were given out, the last 100,000: a key is a hash, and does not tell its K."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[str, int] = OrderedDict()

    def note(self, key: str, num_tokens: int) -> None:
        """Remember that ``key`` stands for ``num_tokens`` VoCo tokens."""
        self._tokens[key] = num_tokens
        if len(self._tokens) > _REMEMBERED:
            self._tokens.popitem(last=False)

    def check(self, key: str, num_tokens: Sequence[int], what: str) -> None:
        """Raise where blocks are of another K than their key.

        Args:
            num_tokens: K of each block of the cache.
            what: the cache, as the message calls it.

        Raises:
            VoCoCacheError: K differs.
        """
        wanted = self._tokens.get(key)
        if wanted is not None and any(count != wanted for count in num_tokens):
            raise VoCoCacheError(
                f"{what} has blocks of K={', '.join(map(str, sorted(set(num_tokens))))}, its key is that of "
                f"K={wanted}: take the key with key_of(image, num_tokens=…) of the K that was compressed."
            )


def fingerprint_of(model: torch.nn.Module, reads: bool = False) -> dict[str, Any]:
    """The fingerprint of what an attached model compresses, also inside PEFT, DDP or ``torch.compile``
    wrappers.

    Args:
        reads: whether it is to be compared with what the model may read, and not make
            (:func:`~voco_plugin.cache.fingerprint.differences_to_reader`).

    Raises:
        ValueError: it is not attached.
    """
    for module in model.modules():
        state = vars(module).get("_voco_attachment")
        if state is not None:
            mine = block_fingerprint(module, state.config, state.processor, state.vocab.voco_id)
            return as_reader(mine, module, state.vocab.voco_id) if reads else mine
    raise ValueError(
        f"{type(model).__name__} has no VoCo attached; call voco_plugin.attach(model, config) first."
    )


def other_makers(store: dict[str, Any], found: dict[str, Any], reads: bool = False) -> list[str]:
    """In words, what tells ``found`` from the fingerprint of a store; K may differ.

    Args:
        reads: whether ``found`` is a model that only reads the store.
    """
    known = store.get("attention"), found.get("attention")
    if None in known:  # a prefix-LM's store learns it from its first block
        store = {name: value for name, value in store.items() if name != "attention"}
        found = {name: value for name, value in found.items() if name != "attention"}
    if reads:
        found, store = compared(found, store)
    return differences(store, found)
