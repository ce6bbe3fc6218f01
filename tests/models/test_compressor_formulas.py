"""Each start of a VoCo token and each rival against its formula, outside any model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import voco_plugin as vp
from contracts.compressors import OPTIONS
from harness import trained
from voco_plugin.models.compressors import build_compressor
from voco_plugin.models.compressors.base import regions
from voco_plugin.models.compressors.pixel_shuffle import shuffle
from voco_plugin.models.compressors.token_merge import merge


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(**options):
    """A compressor of width 6 with weights that say something, in fp64."""
    holder = torch.nn.Module()
    holder.voco_compressor = build_compressor(vp.VoCoConfig(token_id=1, **options), 6).double()
    return trained(holder).voco_compressor


@pytest.mark.parametrize(("n", "k"), [(16, 4), (16, 1), (9, 2), (7, 3), (16, 16), (5, 5), (36, 9)])
def test_regions_are_means_of_their_patches(n, k):
    vision = draw(2, n, 3)
    side, cells = math.isqrt(n), math.isqrt(k)
    square = side * side == n and cells * cells == k
    cut = [
        (i * (side if square else n) // (cells if square else k))
        for i in range(cells + 1 if square else k + 1)
    ]
    up = [
        -(-(i + 1) * (side if square else n) // (cells if square else k))
        for i in range(cells if square else k)
    ]
    for block in range(2):
        expected = []
        if square:
            for r in range(cells):
                for c in range(cells):
                    picked = [
                        vision[block, y * side + x]
                        for y in range(cut[r], up[r])
                        for x in range(cut[c], up[c])
                    ]
                    expected.append(sum(picked) / len(picked))
        else:
            for r in range(k):
                picked = [vision[block, i] for i in range(cut[r], up[r])]
                expected.append(sum(picked) / len(picked))
        torch.testing.assert_close(regions(vision, k)[block], torch.stack(expected))


def merged_plainly(tokens: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    """ToMe by loops over one image's tokens."""
    sizes = [1.0] * len(tokens)
    while len(tokens) > k:
        even, odd = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
        best = []
        for i in odd:
            like = [float(torch.cosine_similarity(tokens[i], tokens[j], dim=0)) for j in even]
            best.append((max(like), i, even[like.index(max(like))]))
        pairs = min(len(tokens) - k, len(tokens) // 2)
        gone = {}
        for _, i, j in sorted(best, key=lambda b: -b[0])[:pairs]:
            gone[i] = j
        sums = {i: tokens[i] * sizes[i] for i in range(len(tokens)) if i not in gone}
        total = {i: sizes[i] for i in sums}
        for i, j in gone.items():
            sums[j] = sums[j] + tokens[i] * sizes[i]
            total[j] += sizes[i]
        tokens, sizes = [sums[i] / total[i] for i in sorted(sums)], [total[i] for i in sorted(sums)]
    return tokens


@pytest.mark.parametrize(("n", "k"), [(16, 1), (16, 5), (7, 3), (4, 4), (9, 8), (5, 2)])
def test_merging_equals_loops(n, k):
    vision = draw(3, n, 4)
    for block in range(3):
        expected = torch.stack(merged_plainly(list(vision[block]), k))
        torch.testing.assert_close(merge(vision, k)[block], expected)
    assert torch.allclose(merge(vision[:, :1].expand(3, n, 4), k), vision[:, :1])  # the mean of equals
    with pytest.raises(ValueError, match="cannot be merged to 17"):
        merge(draw(1, 16, 2), 17)


def test_shuffling_puts_neighbours_side_by_side():
    vision = torch.arange(16.0).view(1, 16, 1)
    squares = shuffle(vision, 4)[0].tolist()
    assert squares == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert shuffle(vision, 2)[0].tolist() == [list(range(8)), list(range(8, 16))]  # 2 is no square
    with pytest.raises(ValueError, match="5 does not divide 16"):
        shuffle(vision, 5)


def test_formulas():
    vision, rows = draw(2, 9, 6), draw(1, 6).expand(3, 6)
    pooled = made(token_init="pooled", num_tokens=3)
    torch.testing.assert_close(
        pooled(vision, rows), rows + regions(vision, 3) @ pooled.seed.weight.transpose(0, 1)
    )
    slots = made(token_init="slots", num_tokens=4)
    torch.testing.assert_close(slots(vision, rows), (rows + slots.offsets[:3]).expand(2, 3, 6))
    average = made(compressor="avg_pool", num_tokens=3)
    weight, bias = average.linear.weight, average.linear.bias
    torch.testing.assert_close(average(vision, rows), regions(vision, 3) @ weight.transpose(0, 1) + bias)
    torch.testing.assert_close(made(compressor="matryoshka")(vision, rows), regions(vision, 3))
    vid = made(compressor="llama_vid", num_tokens=3)
    asked = [draw(4, 6), draw(2, 6)]
    found = vid(vision, rows, asked)
    for block in range(2):
        context = torch.zeros(6, dtype=torch.float64)
        for token in asked[block]:
            scores = torch.stack(
                [(vid.query(token) * vid.key(x)).sum() / math.sqrt(6) for x in vision[block]]
            )
            shares = scores.exp() / scores.exp().sum()
            context = context + sum(s * x for s, x in zip(shares, vision[block], strict=True))
        torch.testing.assert_close(found[block, 0], vid.context(context / len(asked[block])))
        torch.testing.assert_close(found[block, 1:], vid.content(regions(vision[block][None], 2))[0])


def test_qformer_is_blip2s():
    from transformers import Blip2QFormerModel

    compressor = made(**OPTIONS["qformer"])
    assert isinstance(compressor.qformer, Blip2QFormerModel) and compressor.queries.shape == (1, 3, 16)
    vision = draw(2, 9, 6)
    found = compressor(vision, draw(3, 6))
    read = compressor.qformer(query_embeds=compressor.queries.expand(2, -1, -1), encoder_hidden_states=vision)
    torch.testing.assert_close(found, compressor.linear(read.last_hidden_state))
    assert (found[0] - found[1]).abs().max() > 1e-3  # it sees the image
    with pytest.raises(ValueError, match="made for num_tokens=3"):
        compressor(vision, draw(4, 6))


@pytest.mark.parametrize("n", [9, 7, 1])
def test_queries_read_the_image_by_content_and_place(n):
    compressor = made(token_init="queries", num_tokens=3, compressor_options={"hidden_size": 8, "heads": 2})
    vision, rows, side = draw(2, n, 6), draw(2, 6), math.isqrt(n)
    features = torch.nn.functional.layer_norm(
        vision, (6,), compressor.norm.weight, compressor.norm.bias, compressor.norm.eps
    )
    steps, expected = side if side**2 == n else n, torch.zeros(2, 2, 8, dtype=torch.float64)
    for block, token, head in itertools.product(range(2), range(2), range(2)):
        keys, values = [], []
        for i in range(n):
            place = []
            for at in (i // side, i % side) if side**2 == n else (i, None):
                turns = [] if at is None else [2 * math.pi * (at + 0.5) / steps * c for c in (0.5, 16)]
                place += [math.sin(t) for t in turns] + [math.cos(t) for t in turns] or [0.0] * 4
            for found, weight in ((keys, compressor.key.weight), (values, compressor.value.weight)):
                found.append((weight @ features[block, i] + torch.tensor(place))[4 * head : 4 * head + 4])
        scores = torch.stack([compressor.queries[token, head] @ key / 2 for key in keys]).softmax(0)
        expected[block, token, 4 * head : 4 * head + 4] = scores @ torch.stack(values)
    found = compressor(vision, rows)
    # sinusoids are drawn in fp32
    torch.testing.assert_close(found, rows + expected @ compressor.seed.weight.T, rtol=1e-5, atol=1e-5)
    if n > 1:  # an order that a mean does not know
        assert (compressor(vision.flip(1), rows) - found).abs().max() > 1e-3
    with pytest.raises(ValueError, match="made for num_tokens=3"):
        compressor(vision, draw(4, 6))


def test_new_weights_change_nothing_of_the_papers_token():
    vision, rows = draw(2, 9, 6), draw(1, 6).expand(2, 6)
    for init in ("slots", "pooled", "queries"):
        new = build_compressor(vp.VoCoConfig(num_tokens=2, token_init=init), 6).double()
        assert torch.equal(new(vision, rows), rows.expand(2, 2, 6))
    config = vp.VoCoConfig(num_tokens=2, token_init="pooled", compressor_options={"start": "identity"})
    torch.testing.assert_close(
        build_compressor(config, 6).double()(vision, rows), rows + regions(vision, 2), rtol=0, atol=0
    )
    torch.testing.assert_close(
        build_compressor(vp.VoCoConfig(compressor="avg_pool"), 6).double()(vision, rows), regions(vision, 2)
    )
