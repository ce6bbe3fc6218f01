"""What VoCo tokens start from, and rivals outside the LLM: against plain references, over the families."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

import voco_plugin as vp
from contracts import compressors
from contracts.compressors import OPTIONS, merged_and_written
from harness import CORE, attached, inputs, layout_of, plain, shared, text_columns, trained, vocabulary
from matrix import in_turn
from tiny import NAMES, voco_id
from voco_plugin import registry
from voco_plugin.cache.compress import last_rows
from voco_plugin.cache.compress.last_rows import NotCut
from voco_plugin.core.layout import TokenKind
from voco_plugin.models.compressors import build_compressor
from voco_plugin.models.compressors.base import regions
from voco_plugin.models.compressors.pixel_shuffle import shuffle
from voco_plugin.models.compressors.token_merge import merge

REUSABLE = [n for n in OPTIONS if n not in ("llama_vid", "pixel_shuffle", "downsample")]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(**options):
    """A compressor of width 6 with weights that say something, in fp64."""
    holder = torch.nn.Module()
    holder.voco_compressor = build_compressor(vp.VoCoConfig(token_id=1, **options), 6).double()
    return trained(holder).voco_compressor


# -- each against its formula


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


def test_the_first_of_queries_are_what_fewer_tokens_would_be():
    name = "llava_llama"
    model = attached(name, **OPTIONS["queries"]).eval()
    three = inputs(name, [["bos", "t3", "img", "c3", "t4"]])
    with torch.no_grad():
        cut, fewer = model.compress(**three).first(2), model.compress(**three, num_tokens=2)
    one, other = cut.blocks[0], fewer.blocks[0]
    for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


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


# -- in a model


@pytest.mark.parametrize(("name", "option"), in_turn(NAMES, ["pooled", "slots", "queries", "avg_pool"]))
def test_only_voco_slots_are_written_and_from_their_own_image(name, option):
    compressors.only_voco_slots_are_written_and_from_their_own_image(name, option)


@pytest.mark.parametrize("option", REUSABLE)
@pytest.mark.parametrize("name", CORE)
def test_every_compressor_in_two_stages(name, option):
    if option == "token_merge":  # merges to no more tokens than there are
        rows = [["bos", "t3", "img", "c2", "t4"], ["bos", "t6"], ["img", "c1", "img", "c1", "t2"]]
    else:
        rows = None
    model = attached(name, **OPTIONS[option]).eval()
    batch = inputs(name, rows, side="left")
    with torch.no_grad():
        logits, cache = model(**batch).logits, model.compress(**batch)
        stream = model.stream_inputs(batch)
        cached = model(**stream, voco_cache=cache).logits
    real, own = (
        text_columns(model, batch),
        (stream["attention_mask"].bool()) & (stream["input_ids"] != voco_id(name)),
    )
    for row, columns in enumerate(real):
        assert (logits[row, columns] - cached[row, own[row]]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", CORE)
def test_stage_one_of_a_rival_leaves_the_vision_tokens_out(name, monkeypatch):
    model = attached(name, compressor="avg_pool").eval()
    batch = inputs(name, side="left")
    layers = vp.attachment(model).family.text_model(model).layers
    rows: list[int] = []
    handle = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((args or [kwargs["hidden_states"]])[0].shape[1]),
        with_kwargs=True,
    )
    short = model.compress(**batch)
    handle.remove()
    assert set(rows) == {1, 2, 3}, "as many rows as a block has VoCo tokens"

    def refuse(*args):
        raise NotCut("told to")

    monkeypatch.setattr(last_rows, "cut_argument", refuse)
    for a, b in zip(short, model.compress(**batch), strict=True):  # over the whole blocks
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
            assert (x - y).abs().max() <= 1e-5


@pytest.mark.parametrize("context", ["self", "prefix"])
@pytest.mark.parametrize("option", ["avg_pool", "qformer", "token_merge", "matryoshka", "downsample"])
def test_a_rival_is_a_plain_model_that_reads_its_embeddings(option, context):
    compressors.a_rival_is_a_plain_model_that_reads_its_embeddings(option, context)


@pytest.mark.parametrize("option", list(OPTIONS))
def test_gradients_reach_every_weight(option):
    name = "llava_llama"
    options = OPTIONS[option]
    model = attached(name, **options).train()
    batch = inputs(name, [["bos", "t3", "img", f"c{options.get('num_tokens', 2)}", "t4"]])
    if option == "llama_vid":
        with pytest.raises(ValueError, match="question_mask"):
            model(**batch)
        batch["question_mask"] = torch.ones_like(batch["input_ids"])
    plainly = weight_gradients(model, batch)
    assert all(bool(g.abs().max() > 0) for name, g in plainly.items() if not name.endswith("key.bias"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in weight_gradients(model, batch).items():
        torch.testing.assert_close(grad, plainly[name])


def weight_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).logits[:, -3:].pow(2).mean().backward()
    return {n: p.grad.clone() for n, p in model.voco_compressor.named_parameters()}


def test_a_question_is_read_and_answers_are_not():
    name = "llava_llama"
    model = attached(name, **OPTIONS["llama_vid"]).eval()
    batch = inputs(name, [["bos", "t3", "img", "c2", "t6"]])
    columns = text_columns(model, batch)[0]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, columns[-1]] += 1
    mask = torch.zeros_like(batch["input_ids"])
    mask[0, columns[-6:-1]] = 1
    _, a = merged_and_written(model, batch)
    _, b = merged_and_written(model, other)
    voco = layout_of(model, batch).kind[0] == TokenKind.VOCO
    assert (a[0, voco] - b[0, voco]).abs().max() > 1e-4  # no mask: all text behind the image is the question
    _, a = merged_and_written(model, {**batch, "question_mask": mask})
    _, b = merged_and_written(model, {**other, "question_mask": mask})
    assert torch.equal(a[0, voco], b[0, voco])
    with pytest.raises(ValueError, match="reads the question before it compresses"):
        model.compress(**batch)
    made = model.generate(**batch, max_new_tokens=3, do_sample=False)
    again = model.generate(**batch, max_new_tokens=3, do_sample=False, two_stage=False)
    assert torch.equal(made, again)


@pytest.mark.parametrize("option", ["pooled", "queries", "avg_pool", "slots"])
def test_packed_rows_are_as_alone(option):
    compressors.packed_rows_are_as_alone(option)


def test_detaching_and_copying():
    name = "llava_llama"
    batch = inputs(name)
    stock = plain(name).eval()
    with torch.no_grad():
        before = stock(**inputs(name, [["bos", "t6"]])).logits
    names = set(stock.state_dict())
    config = vp.VoCoConfig(token_id=voco_id(name), token_init="pooled")
    model = trained(vp.attach(stock, config, vocabulary=vocabulary(name, stock, config)))
    twin = copy.deepcopy(model)
    assert twin.voco_compressor is not model.voco_compressor
    with torch.no_grad():
        same = twin(**batch).logits
        assert torch.equal(
            same[batch["attention_mask"].bool()], model(**batch).logits[batch["attention_mask"].bool()]
        )
        twin.voco_compressor.seed.weight.zero_()
        assert not torch.equal(twin(**batch).logits, model(**batch).logits)
        assert torch.equal(same, model(**batch).logits)
    vp.detach(model)
    assert set(model.state_dict()) == names and not hasattr(model, "voco_compressor")
    with torch.no_grad():
        assert torch.equal(model(**inputs(name, [["bos", "t6"]])).logits, before)


def test_learned_tokens_bring_no_module():
    model = shared("llava_llama")
    assert not hasattr(model, "voco_compressor") and vp.attachment(model).embeddings is None


@pytest.mark.parametrize("option", ["pooled", "queries", "qformer", "slots"])
def test_a_saved_model_comes_back(option, tmp_path):
    name = "llava_llama"
    model = attached(name, **OPTIONS[option]).eval()
    batch = inputs(name)
    model.save_pretrained(tmp_path)
    assert any(k.startswith("voco_compressor.") for k in _names(tmp_path / "model.safetensors"))
    from voco_plugin.models.compressor_weights import load_compressor, read_compressor

    found = read_compressor(lambda file: str(tmp_path / file) if (tmp_path / file).is_file() else None)
    other = attached(name, **OPTIONS[option]).eval()
    with torch.no_grad():
        for parameter in other.voco_compressor.parameters():
            parameter.zero_()
        assert not torch.equal(other(**batch).logits, model(**batch).logits)
        load_compressor(other, found, tmp_path)
        assert torch.equal(other(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="holds weights of another compressor"):
        load_compressor(attached(name, token_init="slots", num_tokens=5), found, tmp_path)


def _names(path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_a_cache_of_another_compressor_is_refused():
    name = "llava_llama"
    batch = inputs(name)
    model = attached(name).eval()
    cache = model.compress(**batch)
    assert cache.first(1).num_tokens == [1] * len(cache)
    rival = attached(name, compressor="matryoshka").eval()  # no weights of its own: only the name differs
    with pytest.raises(ValueError, match="compressor is 'voco', not 'matryoshka'"):
        rival(**rival.stream_inputs(batch), voco_cache=cache)
    with pytest.raises(ValueError, match="whole number"):
        rival.compress(**batch).first(1)
    old = dict(cache.fingerprint)
    del old["compressor"]  # as written before rivals were there
    with torch.no_grad():
        model(**model.stream_inputs(batch), voco_cache=vp.VoCoCache(cache.blocks, cache.rows, 4, old))


# -- mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compressor": "avg_poll"}, "did you mean 'avg_pool'"),
        ({"compressor": "avg_pool", "compressor_options": {"layers": 2}}, "has no option 'layers'"),
        ({"compressor": "qformer", "compressor_options": {"layer": 2}}, "did you mean 'layers'"),
        ({"compressor": "avg_pool", "rule": "star"}, "use rule='isolated'"),
        ({"compressor": "avg_pool", "token_init": "pooled"}, "leave token_init out"),
        ({"rule": "causal", "token_init": "pooled"}, "use token_init='learned'"),
        ({"rule": "causal", "token_init": "slots"}, "use token_init='learned'"),
        ({"compressor_options": {"layers": 2}}, "would go unused"),
        ({"token_init": "pooled", "compressor_options": {"heads": 2}}, "'pooled' has no option 'heads'"),
        ({"token_init": "pooled", "compressor_options": {"start": "one"}}, "zero or identity, not 'one'"),
        ({"token_init": "queries", "compressor_options": {"head": 2}}, "did you mean 'heads'"),
        ({"token_init": "queries", "compressor_options": {"heads": 3}}, "256 with 3 heads"),
        ({"token_init": "queries", "compressor_options": {"heads": 0}}, "at least 1, not 0"),
        ({"compressor": "llama_vid"}, "must be at least 2"),
        ({"compressor": "pixel_shuffle", "num_tokens": 2}, "needs compressor_options"),
        (
            {"compressor": "pixel_shuffle", "num_tokens": 3, "compressor_options": {"num_vision": 16}},
            "divide",
        ),
        ({"token_init": "pool"}, "did you mean 'pooled'"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        attached("llava_llama", **options)


def test_a_compressor_of_ones_own():
    from voco_plugin.models.compressors import Compressor

    class First(Compressor):
        """The first k features."""

        def forward(self, vision, rows, question=None):
            return vision[:, : len(rows)]

    registry.compressors.register("first_features", First)
    try:
        model = attached("llava_llama", compressor="first_features").eval()
        batch = inputs("llava_llama", [["bos", "t3", "img", "c2", "t4"]])
        before, after = merged_and_written(model, batch)
        span = layout_of(model, batch).spans[0]
        assert torch.equal(after[0, span.voco : span.stop], before[0, span.start : span.start + 2])
    finally:
        registry.compressors._entries.pop("first_features")
