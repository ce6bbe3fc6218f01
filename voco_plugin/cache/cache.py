"""``VoCoBlock``: one compressed image. ``VoCoCache``: an ordered series of blocks, with the fingerprint of
what made them.

Shapes: ``L`` layers, ``H`` key-value heads, ``K`` VoCo tokens of a block, ``D`` head dim.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .file_format import Parts, read_buffer, read_file, to_chunks, write_file
from .fingerprint import check_nested, differences

_SHOWN = 10


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        at = f"at position {self.position}" + ("" if self.relocatable else ", nowhere else")
        return (
            f"VoCoBlock(K={self.num_tokens} for {self.num_vision} vision tokens, {self.num_layers} layers, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, {at})"
        )

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
        """Of the keys and values."""
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the keys and values are."""
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

    def to(self, *args: Any, **kwargs: Any) -> VoCoBlock:
        """Moved or cast as ``Tensor.to``."""
        return dataclasses.replace(
            self,
            keys=tuple(t.to(*args, **kwargs) for t in self.keys),
            values=tuple(t.to(*args, **kwargs) for t in self.values),
        )


class VoCoCache:
    """Blocks in order, each with the batch row it belongs to. Never changed in place: every method gives a
    new one.

    Args:
        blocks: the compressed blocks.
        rows: the batch row of each; all row 0 where left out.
        num_rows: rows of the batch (some may hold no block).
        fingerprint: what made them: hashes of model, adapter and processor, and the rule (see
            ``fingerprint.py``).
    """

    def __init__(
        self,
        blocks: Iterable[VoCoBlock] = (),
        rows: Iterable[int] | None = None,
        num_rows: int | None = None,
        fingerprint: dict[str, Any] | None = None,
    ) -> None:
        self.blocks = tuple(blocks)
        self.rows = tuple(rows) if rows is not None else (0,) * len(self.blocks)
        if len(self.rows) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} blocks but {len(self.rows)} rows were given.")
        self.num_rows = num_rows if num_rows is not None else max(self.rows, default=0) + 1
        if any(not 0 <= row < self.num_rows for row in self.rows):
            raise ValueError(f"rows {sorted(set(self.rows))} do not fit a batch of {self.num_rows}.")
        self.fingerprint = dict(fingerprint or {})

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[VoCoBlock]:
        return iter(self.blocks)

    def __getitem__(self, index: int | slice | Iterable[int]) -> VoCoCache:
        """The named blocks (an index, a slice or a list of indices) as a cache of one row; order as asked."""
        if isinstance(index, int):
            chosen = [self._block(index)]
        elif isinstance(index, slice):
            chosen = list(self.blocks[index])
        else:
            chosen = [self._block(i) for i in index]
        return VoCoCache(chosen, fingerprint=self.fingerprint)

    def _block(self, index: int) -> VoCoBlock:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} is outside this cache's {len(self)} blocks.")
        return self.blocks[index]

    def row(self, row: int) -> VoCoCache:
        """The blocks of one batch row, as a cache of one row."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} is outside this cache's {self.num_rows} rows.")
        return VoCoCache(
            [b for b, r in zip(self.blocks, self.rows, strict=True) if r == row], fingerprint=self.fingerprint
        )

    @staticmethod
    def cat(caches: Iterable[VoCoCache]) -> VoCoCache:
        """All blocks of ``caches`` in order as one row (images of different runs in one prompt).

        Raises:
            ValueError: they were made by different models, adapters, processors or rules; the message says
                which.
        """
        caches = list(caches)
        if not caches:
            return VoCoCache()
        first = next((c for c in caches if len(c)), caches[0])
        for number, cache in enumerate(caches):
            wrong = differences(first.fingerprint, cache.fingerprint) if len(cache) else []
            if wrong:
                raise ValueError(f"cache {number} was made otherwise than the first: {'; '.join(wrong)}.")
        return VoCoCache([b for c in caches for b in c.blocks], fingerprint=first.fingerprint)

    def _one_row(self, what: str) -> VoCoCache:
        if self.num_rows > 1:
            raise ValueError(f"{what} works on one row, this cache holds {self.num_rows}; take cache.row(i).")
        return self

    def insert(self, index: int, other: VoCoCache) -> VoCoCache:
        """The blocks of ``other`` before block ``index`` (as ``list.insert`` counts).

        Raises:
            ValueError: several rows, or made by another model or rule.
        """
        index = range(len(self))[slice(index, None)].start  # clamped, and from the end where negative
        before, after = self._one_row("insert")[:index], self[index:]
        return VoCoCache.cat([before, other._one_row("insert"), after])

    def drop(self, index: int | Iterable[int]) -> VoCoCache:
        """Without the named blocks (an index or several; negative ones count from the end).

        Raises:
            IndexError: there is no such block.
            ValueError: several rows.
        """
        gone = {range(len(self))[i] for i in ([index] if isinstance(index, int) else index)}
        return self._one_row("drop")[[i for i in range(len(self)) if i not in gone]]

    def reorder(self, order: Iterable[int]) -> VoCoCache:
        """The blocks in another order.

        Args:
            order: every index once. (``cache[[…]]`` takes some, or one several times.)

        Raises:
            ValueError: an index is missing or named twice; several rows.
        """
        order = [range(len(self))[i] for i in order]
        if sorted(order) != list(range(len(self))):
            raise ValueError(f"reorder({order}): name each of the {len(self)} blocks once.")
        return self._one_row("reorder")[order]

    @staticmethod
    def stack(caches: Iterable[VoCoCache]) -> VoCoCache:
        """A batch: the blocks of each of ``caches`` become one row."""
        caches = list(caches)
        joined = VoCoCache.cat(caches)
        rows = [row for row, cache in enumerate(caches) for _ in cache.blocks]
        return VoCoCache(joined.blocks, rows, max(len(caches), 1), joined.fingerprint)

    def first(self, k: int) -> VoCoCache:
        """Every block cut to its first ``k`` VoCo tokens (paper, Table 4).

        Raises:
            ValueError: the K tokens of a block were made together (``token_init="pooled"``, or a compressor
                outside the LLM), so the first of them are not what a compression into ``k`` gives.
        """
        check_nested(self.fingerprint)
        return VoCoCache([b.first(k) for b in self.blocks], self.rows, self.num_rows, self.fingerprint)

    def to(self, *args: Any, **kwargs: Any) -> VoCoCache:
        """Moved or cast as ``Tensor.to``."""
        return VoCoCache(
            [b.to(*args, **kwargs) for b in self.blocks], self.rows, self.num_rows, self.fingerprint
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(b.nbytes for b in self.blocks)

    @property
    def num_tokens(self) -> list[int]:
        """K of each block."""
        return [b.num_tokens for b in self.blocks]

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with metadata and a checksum to ``path``; whole or not at all."""
        write_file(path, to_chunks(self.blocks, self.rows, self.num_rows, self.fingerprint))

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> VoCoCache:
        """Read a file written by :meth:`save`, checked before it is used.

        Args:
            path: the file.
            device: where its tensors go.

        Raises:
            VoCoCacheError: not a cache file, truncated, tampered with, or of another format version.
            FileNotFoundError: there is no such file.
        """
        cache = cache_from_parts(read_file(path))
        return cache if str(device) == "cpu" else cache.to(device)

    def __repr__(self) -> str:
        tokens = sorted(set(self.num_tokens))
        return f"VoCoCache({len(self)} blocks, K={tokens}, {self.num_rows} rows, {self.nbytes / 1e6:.3f} MB)"

    def _repr_html_(self) -> str:
        """A table for a notebook: the first blocks, and what made them."""
        head = ("row", "K", "vision tokens", "position", "MB")
        lines = [
            (r, b.num_tokens, b.num_vision, b.position, f"{VoCoCache([b]).nbytes / 1e6:.3f}")
            for r, b in itertools.islice(zip(self.rows, self.blocks, strict=True), _SHOWN)
        ]
        cells = ["".join(f"<td>{html.escape(str(v))}</td>" for v in line) for line in lines]
        more = f"<p>and {len(self) - _SHOWN} more</p>" if len(self) > _SHOWN else ""
        made = {n: self.fingerprint[n] for n in ("name", "rule", "dtype") if n in self.fingerprint}
        return (
            f"<p>{html.escape(repr(self))} {html.escape(', '.join(f'{n}={v}' for n, v in made.items()))}</p>"
            f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>"
            f"{''.join(f'<tr>{c}</tr>' for c in cells)}</table>{more}"
        )


def cache_to_bytes(cache: VoCoCache, values: str = "keep") -> bytes:
    """The bytes of the file that ``cache.save`` writes.

    Args:
        values: ``"keep"``, or ``"int8"`` for 8 bits a value (:mod:`.int8`).

    Raises:
        ValueError: the blocks differ in layers or dtype, or ``values`` is not known.
        VoCoCacheError: the cache holds what no reader would take back.
    """
    return b"".join(to_chunks(cache.blocks, cache.rows, cache.num_rows, cache.fingerprint, values))


def cache_from_buffer(buffer: Any, where: str = "this buffer", copy: bool = True) -> VoCoCache:
    """The cache in ``buffer``, the bytes of a saved file, after every check.

    Args:
        where: what it is called in messages.
        copy: ``False`` gives tensors that lie in ``buffer`` (where its bytes are aligned for their dtype):
            read-only, whatever torch believes, and valid as long as the buffer is.

    Raises:
        VoCoCacheError: not a cache, truncated, changed, or of another format version.
    """
    return cache_from_parts(read_buffer(buffer, where, copy))


def cache_from_parts(parts: Parts) -> VoCoCache:
    """The cache of what :func:`~voco_plugin.cache.file_format.read_buffer` found."""
    blocks = [VoCoBlock(**fields) for fields in parts.blocks]
    return VoCoCache(blocks, parts.rows, parts.num_rows, parts.fingerprint)
