"""The rule as plain attention calls: who may see whom, cut into segments outside which nothing is visible.

``isolated``, ``block_context="self"``, two images (``B`` rows of ``N`` tokens laid end to end, ``B·N``):

    tokens       t v v v C v v v C t t
    segment 1      v v v C                 rows and keys of the first block
    segment 2              v v v C         of the second
    segment 3    t       C       C t t     the stream: its VoCo rows are computed and thrown away (K of them)

Within a segment the backbone's own mask and the rule are asked again, pair by pair, unless both are known to
be plain causal there. So nothing is assumed about windows, bidirectional images or ``star``: only that what
lies outside the segments is hidden, which the rule says of itself.

    rule        block rows see                          stream rows see
    isolated    their block                             text and VoCo
    star        V: itself; C: their block               text and VoCo
    a rival     V: itself; C: the C of their block      text and VoCo
    prefix      their block and the stream before it    text and VoCo
    causal      all of their document (a rule only where rows are packed)

Of packed rows each document has a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.masking_utils import causal_mask_function

from ...config import VoCoConfig
from ..layout import TokenKind
from ..masks import TokenTable, isolation_predicate


@dataclass
class Segments:
    """Segments of one shape, to be run as one batched call.

    Attributes:
        count: ``G`` segments.
        rows, keys: ``n`` rows and ``m`` keys of each.
        mask: ``(G, 1, n, m)`` bool; ``None`` where it is plain causal and ``n == m``.
    """

    count: int
    rows: int
    keys: int
    mask: torch.Tensor | None = None


@dataclass
class SegmentPlan:
    """What replaces the mask of a forward of ``B`` rows and ``N`` tokens.

    Attributes:
        groups: the calls, one after the other.
        rows: ``(ΣGn,)`` int64, the token (of ``B·N``) of each row of each segment, group after group.
        keys: ``(ΣGm,)`` int64, of each key; the same tensor as ``rows`` where all segments are square.
        place: ``(B·N,)`` int64, where each token's output stands among the rows' outputs; ``ΣGn`` (a row of
            zeros) for padding.
    """

    groups: list[Segments]
    rows: torch.Tensor
    keys: torch.Tensor
    place: torch.Tensor
    dtype: torch.dtype = torch.float32
    _float: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are computed."""
        return sum(g.count * g.rows * g.keys for g in self.groups)

    @property
    def mask_bytes(self) -> int:
        """Bytes of the masks."""
        return sum(g.mask.numel() for g in self.groups if g.mask is not None)

    def additive(self, number: int) -> torch.Tensor:
        """The mask of a group as an additive one, for kernels that know no other: ``(G or 1, 1, n, m)``."""
        if number not in self._float:
            group = self.groups[number]
            mask = group.mask
            if mask is None:
                device = self.rows.device
                mask = torch.ones(1, 1, group.rows, group.keys, dtype=torch.bool, device=device).tril()
            low = torch.finfo(self.dtype).min
            self._float[number] = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, low)
        return self._float[number]


class SegmentMask(torch.Tensor):
    """What the layers get as their mask: ``(B, 1, N, N)`` to look at, without storage, carrying the plan.

    Models hand masks on, and some pass one that is 4-D through mask making a second time; nothing may compute
    with this one.

    Attributes:
        plan: the :class:`SegmentPlan`.
    """

    plan: SegmentPlan

    @staticmethod
    def of(plan: SegmentPlan, batch: int, tokens: int) -> SegmentMask:
        nothing = torch.zeros((), dtype=torch.bool, device=plan.rows.device)
        made = nothing.expand(batch, 1, tokens, tokens).as_subclass(SegmentMask)
        made.plan = plan
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            f"this backbone computes with its attention mask ({func.__name__}), which attention='segmented' "
            "does not make; use attention='dense'."
        )


_LOOKS = {"__get__", "dim", "size", "numel", "is_floating_point", "get_device", "type", "__len__", "__repr__"}


def plan_segments(
    config: VoCoConfig,
    table: TokenTable,
    mask_function: Callable,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SegmentPlan:
    """The segments of a forward without past, whose slots stand in sequence order.

    Args:
        table: of the ``B`` rows of ``N`` tokens.
        mask_function: the backbone's own, ``f(batch, head, query, key) -> bool``.
        device: where the layers run; the table's where left out. (A table on the CPU is read without waiting
        for
            the device.)
    """
    device = table.kind.device if device is None else torch.device(device)
    kind, block = table.kind.cpu().numpy(), table.block.cpu().numpy()
    document = np.zeros_like(kind) if table.document is None else table.document.cpu().numpy()
    found = _find(config, kind, block, document)
    by_shape: dict[tuple[int, int, bool], list[tuple[np.ndarray, np.ndarray]]] = {}
    for rows, keys, plain in found:
        by_shape.setdefault((len(rows), len(keys), plain), []).append((rows, keys))
    visible = isolation_predicate(config, table.to(device))
    causal = mask_function is causal_mask_function
    groups, all_rows, all_keys = [], [], []
    for (n, m, plain), members in by_shape.items():
        rows = np.stack([r for r, _ in members])
        keys = np.stack([k for _, k in members])
        mask = None
        if not (causal and plain):
            mask = _mask(mask_function, visible, rows, keys, table.length, device)
            tril = torch.ones(n, m, dtype=torch.bool, device=device).tril()
            if n == m and bool((mask == tril).all()):
                mask = None
        groups.append(Segments(len(members), n, m, mask))
        all_rows.append(rows.reshape(-1))
        all_keys.append(keys.reshape(-1))
    rows, keys = (np.concatenate(x) if x else np.zeros(0, dtype=np.int64) for x in (all_rows, all_keys))
    place = np.full(kind.size, len(rows), dtype=np.int64)
    for at in _writers(rows, kind.reshape(-1), by_shape):
        place[rows[at]] = at
    square = np.array_equal(rows, keys)
    row_tensor = torch.from_numpy(rows).to(device)
    return SegmentPlan(
        groups,
        row_tensor,
        row_tensor if square else torch.from_numpy(keys).to(device),
        torch.from_numpy(place).to(device),
        dtype,
    )


def _find(
    config: VoCoConfig, kind: np.ndarray, block: np.ndarray, document: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """``(rows, keys, plain causal as far as the rule goes)`` of each segment, as indices into ``B·N``. A
    row's stream comes first, so that the blocks' own outputs of VoCo rows are the ones that stay.
    """
    found: list[tuple[np.ndarray, np.ndarray, bool]] = []
    width = kind.shape[1]
    pieces = [(row, document[row] == d) for row in range(len(kind)) for d in np.unique(document[row])]
    for row, here in pieces:
        base = row * width
        if config.rule == "causal":
            tokens = np.flatnonzero(here & (kind[row] != TokenKind.PAD)) + base
            found += [(tokens, tokens, True)] if len(tokens) else []
            continue
        is_text = here & (kind[row] == TokenKind.TEXT)
        stream = np.flatnonzero(is_text | (here & (kind[row] == TokenKind.VOCO)))
        if is_text.any():
            found.append((stream + base, stream + base, not config.hide_prefix))
        inside = np.flatnonzero(here & (block[row] >= 0))
        edges = np.flatnonzero(np.diff(block[row][inside])) + 1
        for tokens in np.split(inside, edges) if len(inside) else []:
            before = np.zeros(0, dtype=np.int64)
            if config.block_context == "prefix":
                before = stream[stream < tokens[0]]
            keys = np.concatenate([before, tokens])
            if config.rule == "star" or not config.reads_vision:
                is_vision = kind[row][tokens] == TokenKind.VISION
                vision, voco = tokens[is_vision], tokens[~is_vision]
                if len(before):
                    found += [(v[None] + base, np.append(before, v) + base, False) for v in vision]
                else:
                    found += [(v[None] + base, v[None] + base, True) for v in vision]
                if len(voco) and not config.reads_vision:
                    found.append((voco + base, np.append(before, voco) + base, not len(before)))
                elif len(voco):
                    found.append((voco + base, keys + base, False))
            else:
                found.append((tokens + base, keys + base, not len(before)))
    return found


def _writers(rows: np.ndarray, kind: np.ndarray, by_shape: dict) -> list[np.ndarray]:
    """Which outputs are written, in order: those of streams first, then those of blocks, which also have the
    VoCo rows.
    """
    from_stream = np.zeros(len(rows), dtype=bool)
    at = 0
    for members in by_shape.values():
        for members_rows, _ in members:
            stop = at + len(members_rows)
            from_stream[at:stop] = (kind[members_rows] == TokenKind.TEXT).any()
            at = stop
    return [np.flatnonzero(from_stream), np.flatnonzero(~from_stream)]


def _mask(
    mask_function: Callable,
    visible: Callable,
    rows: np.ndarray,
    keys: np.ndarray,
    width: int,
    device: torch.device,
) -> torch.Tensor:
    """The backbone's mask and the rule on ``(G, n)`` rows and ``(G, m)`` keys: ``(G, 1, n, m)`` bool."""
    q = torch.from_numpy(rows % width).to(device)[:, None, :, None]
    k = torch.from_numpy(keys % width).to(device)[:, None, None, :]
    b = torch.from_numpy(rows[:, :1] // width).to(device)[:, :, None, None]
    h = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    seen = mask_function(b, h, q, k) & visible(b, h, q, k)
    return seen.expand(len(rows), 1, rows.shape[1], keys.shape[1])
