"""One compressed image: the keys and values of its K VoCo tokens in every layer.

Shapes: ``L`` layers, ``H`` key-value heads, ``K`` VoCo tokens, ``D`` head dim.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class VoCoBlock:
    """The cache of one block (paper, Sec. 3.3).

    Attributes:
        keys: per layer ``(H, K, D)``, rotated for ``position``.
        values: per layer ``(H, K, D)``.
        position: the position its first VoCo token was computed at. Placing the block there changes no bit;
            elsewhere its keys are rotated by the difference.
        extent: how far the backbone's positions advance over its vision tokens.
        num_vision: how many vision tokens it compresses.
        relocatable: whether it depends on nothing before it (``block_context="self"``).
        order: index of its first VoCo token in the whole sequence (vision tokens counted) it was compressed
            in. Only a backbone that attends in chunks (Llama 4) asks where a block stood.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    position: int
    extent: int
    num_vision: int
    relocatable: bool = True
    order: int = 0

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.keys[0].shape[1]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def cuts(self, chunk: int, order: int) -> list[int]:
        """Where chunks of ``chunk`` tokens would cut this block, were its first VoCo token at ``order``."""
        start = order - self.num_vision
        return [i for i in range(1, self.num_vision + self.num_tokens) if (start + i) % chunk == 0]

    def first(self, k: int) -> VoCoBlock:
        """The block of its first ``k`` VoCo tokens (paper, Table 4): under causal attention they are what a
        compression into ``k`` tokens gives.

        Raises:
            ValueError: ``k`` is not within 1 … K.
        """
        if not 1 <= k <= self.num_tokens:
            raise ValueError(
                f"first({k}): this block has {self.num_tokens} VoCo tokens; k must be 1…{self.num_tokens}."
            )
        return dataclasses.replace(
            self,
            keys=tuple(t[:, :k].contiguous() for t in self.keys),
            values=tuple(t[:, :k].contiguous() for t in self.values),
        )

    def to(self, *args, **kwargs) -> VoCoBlock:
        """Moved or cast as ``Tensor.to``."""
        return dataclasses.replace(
            self,
            keys=tuple(t.to(*args, **kwargs) for t in self.keys),
            values=tuple(t.to(*args, **kwargs) for t in self.values),
        )
