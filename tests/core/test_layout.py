"""Where V, C and text are: hypothesis rows against regular expressions, malformed rows against their
errors.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import layout
from contracts.layout import BOS, VOCAB, C, G, M, V, as_letters, batch, pad
from reference import base_mask, rule_mask
from voco_plugin import LayoutError, SequenceLayout, TokenVocabulary, VoCoConfig
from voco_plugin.core.layout import TokenKind, compact_positions
from voco_plugin.core.masks import TokenTable, dense_mask, draw_mask, isolation_predicate

SINK = TokenVocabulary(
    voco_id=C, placeholders=frozenset({V}), markers=frozenset({M}), glue=frozenset({G}), bos_id=BOS
)


def test_kinds_blocks_and_positions_equal_the_plain_reading():
    layout.kinds_blocks_and_positions_equal_the_plain_reading()


OPTIONS = [
    {},
    {"block_context": "prefix"},
    {"rule": "star"},
    {"rule": "star", "block_context": "prefix"},
    {"rule": "causal"},
    {"hide_prefix": True},
    {"hide_prefix": True, "block_context": "prefix"},
]


@settings(max_examples=100, deadline=None)
@given(batch, st.sampled_from(OPTIONS))
def test_dense_mask_equals_the_table(drawn, options):
    ids, mask = pad(*drawn)
    layout = SequenceLayout.from_ids(ids, mask, VOCAB)
    made = dense_mask(VoCoConfig(**options), layout, mask)
    for r, line in enumerate(as_letters(ids, mask)):
        assert torch.equal(made[r], base_mask(line) & rule_mask(line, **options)), line


@settings(max_examples=50, deadline=None)
@given(batch, st.sampled_from(OPTIONS), st.randoms())
def test_the_rule_does_not_depend_on_the_order_of_cache_slots(drawn, options, random):
    """Slots shuffled (stage 2 puts blocks first): each pair is judged as in sequence order."""
    ids, mask = pad(*drawn)
    layout = SequenceLayout.from_ids(ids, mask, VOCAB)
    config = VoCoConfig(**options)
    table = TokenTable.from_layout(layout)
    order = list(range(layout.num_tokens))
    random.shuffle(order)
    shuffled = TokenTable(table.kind[:, order], table.block[:, order], table.order[:, order])
    b = torch.arange(layout.num_rows)[:, None, None]
    q = torch.arange(layout.num_tokens)[None, :, None]
    k = torch.arange(layout.num_tokens)[None, None, :]
    straight = isolation_predicate(config, table)(b, 0, q, k)
    mixed = isolation_predicate(config, shuffled)(b, 0, q, k)
    assert torch.equal(straight[:, order][:, :, order], mixed)


def test_bos_sink_is_a_vision_token_of_its_block():
    ids = torch.tensor([[BOS, 2, BOS, V, V, C, 3, BOS, M, V, C, C]])
    layout = SequenceLayout.from_ids(ids, None, SINK)
    assert "".join(".tvC"[k] for k in layout.kind[0].tolist()) == "ttvvvCtvvvCC"
    assert torch.equal(dense_mask(VoCoConfig(block_sink="bos"), layout)[0], _sink_table(ids))


def _sink_table(ids):
    line = as_letters(ids, torch.ones_like(ids), bos=BOS)[0]
    return base_mask(line) & rule_mask(line, sink=True)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[2, 3], [2, V, V, 3]], {}, r"sample 1, position 1: vision tokens with no VoCo"),
        ([[2, C, 3]], {}, r"sample 0, position 1: 1 VoCo token\(s\) with no vision"),
        ([[V, 2, C]], {}, r"sample 0, position 2: 1 VoCo token\(s\) with no vision"),
        ([[V, C, C, 2]], {"num_tokens": 3}, r"sample 0, position 1: 2 VoCo token\(s\) where 3 were asked"),
        ([[V, C, V]], {}, r"sample 0, position 2: vision tokens with no VoCo"),
        ([[V, G, C]], {}, r"sample 0, position 2"),
    ],
)
def test_malformed_rows_name_sample_and_position(rows, options, message):
    ids, mask = pad(rows, "right")
    with pytest.raises(LayoutError, match=message):
        SequenceLayout.from_ids(ids, mask, VOCAB, **options)


def test_a_block_without_its_sink_is_an_error():
    with pytest.raises(LayoutError, match="sample 0, position 1: block_sink='bos'"):
        SequenceLayout.from_ids(torch.tensor([[2, V, C]]), None, SINK)


def test_a_mask_of_another_shape_is_an_error():
    with pytest.raises(LayoutError, match=r"attention_mask must be 2-D of shape \(1, 3\)"):
        SequenceLayout.from_ids(torch.tensor([[2, V, C]]), torch.ones(1, 1, 3, 3), VOCAB)


def test_markers_alone_are_text():
    layout = SequenceLayout.from_ids(torch.tensor([[2, M, 3]]), None, VOCAB)
    assert not layout.has_vision and not layout.spans


def test_vision_without_voco_is_allowed_where_nothing_is_isolated():
    layout = SequenceLayout.from_ids(torch.tensor([[2, V, 3]]), None, VOCAB, require_voco=False)
    assert layout.kind[0].tolist() == [TokenKind.TEXT, TokenKind.VISION, TokenKind.TEXT]


def test_compact_positions_keep_mrope_distances_within_a_block():
    ids = torch.tensor([[2, 2, V, V, V, V, C, C, 3]])
    layout = SequenceLayout.from_ids(ids, None, VOCAB)
    grid = torch.tensor(
        [[0, 1, 2, 2, 2, 2, 4, 5, 6], [0, 1, 2, 2, 3, 3, 4, 5, 6], [0, 1, 2, 3, 2, 3, 4, 5, 6]]
    )
    made = compact_positions(layout, grid[:, None])[:, 0]
    assert made[:, [0, 1, 6, 7, 8]].tolist() == [[0, 1, 2, 3, 4]] * 3
    inside = slice(2, 8)
    assert torch.equal(made[:, inside] - made[:, 6:7], grid[:, inside] - grid[:, 6:7])


def test_the_drawing_is_the_mask():
    layout = SequenceLayout.from_ids(torch.tensor([[2, V, V, C, 3]]), None, VOCAB)
    config = VoCoConfig()
    drawn = draw_mask(config, layout).splitlines()
    assert drawn[0].split() == ["t", "v", "v", "C", "t"]
    for line, row in zip(drawn[1:], dense_mask(config, layout)[0].tolist(), strict=True):
        cells = [line[2 + 2 * i : 3 + 2 * i] == "x" for i in range(5)]
        assert cells == row
