"""What tests/core/test_layout.py holds; run on broken versions too."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import compact_numbers, letters, read
from voco_plugin import SequenceLayout, TokenVocabulary
from voco_plugin.core.layout import compact_positions, sequential_positions

V, M, G, C, BOS = 10, 11, 12, 13, 1


VOCAB = TokenVocabulary(voco_id=C, placeholders=frozenset({V}), markers=frozenset({M}), glue=frozenset({G}))


text = st.lists(st.sampled_from([2, 3, G]), max_size=4)


tiles = st.lists(
    st.sampled_from([[V], [V, V], [V, G, V], [V, G, G, V], [M, V, M], [M, V, G, V]]), min_size=1, max_size=2
)


block = st.builds(lambda parts, k: [t for p in parts for t in p] + [C] * k, tiles, st.integers(1, 3))


row = st.builds(
    lambda parts: [t for p in parts for t in p], st.lists(st.one_of(text, block), max_size=5)
).filter(len)


batch = st.tuples(st.lists(row, min_size=1, max_size=3), st.sampled_from(["left", "right"]))


def pad(rows, side):
    longest = max(len(r) for r in rows)
    ids, mask = [], []
    for r in rows:
        gap = longest - len(r)
        ids.append([0] * gap + r if side == "left" else r + [0] * gap)
        mask.append([0] * gap + [1] * len(r) if side == "left" else [1] * len(r) + [0] * gap)
    return torch.tensor(ids), torch.tensor(mask)


def as_letters(ids, mask, bos=None):
    return [
        letters(r, m, vision={V, M}, voco=C, glue={G}, bos=bos)
        for r, m in zip(ids.tolist(), mask.tolist(), strict=True)
    ]


@settings(max_examples=200, deadline=None)
@given(batch)
def kinds_blocks_and_positions_equal_the_plain_reading(drawn):
    ids, mask = pad(*drawn)
    layout = SequenceLayout.from_ids(ids, mask, VOCAB)
    compact = compact_positions(layout, sequential_positions(mask))
    for r, line in enumerate(as_letters(ids, mask)):
        kinds, blocks = read(line)
        assert "".join(".tvC"[k] for k in layout.kind[r].tolist()) == kinds
        assert layout.block[r].tolist() == blocks
        numbers = compact_numbers(line)
        assert [p for p, n in zip(compact[r].tolist(), numbers, strict=True) if n is not None] == [
            n for n in numbers if n is not None
        ]
        for span in layout.row_spans(r):
            assert kinds[span.start : span.voco] == "v" * span.num_vision
            assert kinds[span.voco : span.stop] == "C" * span.num_voco
