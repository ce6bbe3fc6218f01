"""VoCo blocks in a paged cache, under virtual token ids.

    stream          s  a  <voco> <voco>  b          a prompt as it was tokenized
    scheduled       s  a   B+7    B+8    b          ids that no vocabulary has: (block, i)
    forward         s  a  <voco> <voco>  b          the model sees a token it knows, ...
    cache.update    k  k    K0     K1    k          ... whose keys and values the moved block's replace

An id stands for one token of one image, so that upstream's prefix sharing, which compares ids, shares what is
equal and nothing else. What is computed at a VoCo token is thrown away: text reads its keys and values alone.

This file alone touches what is internal upstream: the arguments of the forward, and the ``update`` of
``PagedAttentionCache``, which was read at transformers 5.24.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import __version__ as installed

from ....cache import VoCoBlock
from ....cache.place.relocation import Relocator
from ..request import EngineError

FIRST_ID = 1 << 30
"""Below it are the ids of a vocabulary; upstream's ids have 31 bits."""
LAST_ID = (1 << 31) - 1
_REMEMBERED = 100_000
_UPDATE = ["self", "key_states", "value_states", "layer_idx", "kwargs"]


def check_upstream() -> None:
    """Refuse a continuous batching that this file was not written for.

    Raises:
        EngineError: it is not there, or its cache is updated in another way.
    """
    try:
        from transformers.generation.continuous_batching.cache import PagedAttentionCache
    except ImportError as problem:
        raise EngineError(
            f"transformers {installed} has no continuous batching that this engine knows ({problem}); "
            "install transformers>=5.24."
        ) from problem
    found = list(inspect.signature(PagedAttentionCache.update).parameters)
    if found != _UPDATE:
        raise EngineError(
            f"transformers {installed} updates its paged cache with ({', '.join(found)}), and this engine "
            f"was written for ({', '.join(_UPDATE)}), as in 5.24; install that."
        )


class NoIdsLeftError(EngineError):
    """A thousand million ids have been given out; a new cache has to begin at the first again."""


class PagedBlocks:
    """The blocks that requests in flight read, by virtual ids.

    Args:
        relocator: of the language model that runs.
        voco_id: what the forward sees in the place of a virtual id.
    """

    def __init__(self, relocator: Relocator, voco_id: int, device: torch.device) -> None:
        self.relocator, self.voco_id, self.device = relocator, voco_id, device
        self._lock = threading.Lock()
        self._first: OrderedDict[str, tuple[int, int]] = OrderedDict()  # by name: first id, K
        self._held: dict[int, list[Any]] = {}  # by first id: block, how many requests read it
        self._owner: dict[int, tuple[int, int]] = {}  # by id: first id, i
        self._next = FIRST_ID
        self._now: tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]] | None = None

    # -- who reads what

    def hold(self, name: str, block: VoCoBlock) -> list[int]:
        """The ids of a block, which stay its own as long as somebody holds it, and after that as long as
        nothing else needs the memory.

        Args:
            name: the same for the same content, and for nothing else.

        Raises:
            NoIdsLeftError: all ids were given out.
        """
        count = block.num_tokens
        with self._lock:
            first, known = self._first.get(name, (0, 0))
            if known != count:
                first = self._next
                if first + count > LAST_ID:
                    raise NoIdsLeftError("the engine has given out all ids for blocks, and begins anew.")
                self._next += count
            self._first[name] = (first, count)
            self._first.move_to_end(name)
            held = self._held.setdefault(first, [None, 0])
            if held[0] is None:
                held[0] = block.to(self.device)
                self._owner.update({first + i: (first, i) for i in range(count)})
            held[1] += 1
            while len(self._first) > _REMEMBERED:
                self._first.popitem(last=False)
        return list(range(first, first + count))

    def release(self, first: int) -> None:
        """A request that held the block of this first id is gone."""
        with self._lock:
            held = self._held[first]
            held[1] -= 1
            if not held[1]:
                for i in range(held[0].num_tokens):
                    del self._owner[first + i]
                del self._held[first]

    def __len__(self) -> int:
        return len(self._held)

    # -- inside a forward, on the engine's thread

    def attach(self, model: torch.nn.Module) -> list[Any]:
        """Hooks on ``model`` for as long as the engine runs it; their handles."""
        return [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def wrap(self, cache: Any) -> None:
        """Let ``cache`` (a ``PagedAttentionCache``) keep the blocks' keys and values."""
        update = cache.update

        def replaced(
            key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
        ) -> Any:
            if self._now is not None:  # (1, H, T, D) both
                at, keys, values = self._now
                key_states = key_states.index_copy(2, at, keys[layer_idx][None])
                value_states = value_states.index_copy(2, at, values[layer_idx][None])
            return update(key_states, value_states, layer_idx, kwargs)

        cache.update = replaced

    def _before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = kwargs["input_ids"]  # (1, T)
        at = (ids[0] >= FIRST_ID).nonzero().flatten()
        self._now = None
        if len(at):
            positions = kwargs["position_ids"].reshape(-1)[at].long()
            self._now = (at, *self._moved(ids[0][at].tolist(), positions))
            known = ids.clone()
            known[0, at] = self.voco_id
            kwargs = {**kwargs, "input_ids": known}
        return args, kwargs

    def _after(self, *_: Any) -> None:
        self._now = None

    def _moved(
        self, ids: Sequence[int], positions: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per layer the keys ``(H, n, D)`` and values of the tokens ``ids``, at ``positions`` ``(n,)``."""
        with self._lock:
            owners = [self._owner[i] for i in ids]
            blocks = {first: self._held[first][0] for first, _ in owners}
        pieces: list[tuple[VoCoBlock, int, int]] = []  # block, from, to
        for first, i in owners:
            block = blocks[first]
            if pieces and pieces[-1][0] is block and pieces[-1][2] == i:
                pieces[-1] = (block, pieces[-1][1], i + 1)
            else:
                pieces.append((block, i, i + 1))
        stood = [block.position + i for block, begin, end in pieces for i in range(begin, end)]
        layers = range(pieces[0][0].num_layers)
        keys = [torch.cat([b.keys[n][:, i:j] for b, i, j in pieces], 1) for n in layers]
        values = [torch.cat([b.values[n][:, i:j] for b, i, j in pieces], 1) for n in layers]
        deltas = positions - torch.tensor(stood, device=positions.device)
        return self.relocator.move((keys, values), deltas)


__all__ = ["FIRST_ID", "NoIdsLeftError", "PagedBlocks", "check_upstream"]
