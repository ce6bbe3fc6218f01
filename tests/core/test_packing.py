"""A packed conversation is as it is alone: logits, losses, gradients, positions; nothing leaks to another."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import voco_plugin as vp
from attention_layers import both, tables
from harness import CORE, ROWS, RULES, attached, inputs, rows_for, shared
from matrix import combined, quick_rule
from packed import COUNTS, LONG, numbered, packed_inputs
from tiny import NAMES, PAD
from voco_plugin.core.attention import interface
from voco_plugin.core.forward import ONE_PASS, _prepare, as_cache, cache_of
from voco_plugin.core.masks import TokenTable
from voco_plugin.core.packed_rows import DOCUMENT_IDS, Documents, first_fit_decreasing, pack_batch


def documents_of(packed, value):
    """``value`` ``(B, N, …)`` of each document in turn."""
    ids = packed[DOCUMENT_IDS]
    return [value[row, ids[row] == n] for row in range(len(ids)) for n in range(1, int(ids[row].max()) + 1)]


# -- choosing rows


def plain_first_fit(lengths, capacity, order):
    rows, room = [], []
    for index in order:
        fits = [i for i, left in enumerate(room) if left >= lengths[index]]
        if not fits:
            rows.append([])
            room.append(capacity)
        at = fits[0] if fits else len(rows) - 1
        rows[at].append(index)
        room[at] -= lengths[index]
    return rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90), st.integers(0, 3))
def test_first_fit_decreasing(lengths, capacity, seed):
    rows = first_fit_decreasing(lengths, capacity, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))  # every one, whole, once
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == first_fit_decreasing(lengths, capacity, seed)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    naive = plain_first_fit(lengths, capacity, order)
    sizes = [[sorted((lengths[i] for i in row), reverse=True) for row in found] for found in (rows, naive)]
    assert sizes[0] == sizes[1]


def test_rows_are_well_filled_and_the_seed_mixes_equals():
    lengths = random.Random(0).choices(range(30, 900), k=2000)
    rows = first_fit_decreasing(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.98
    assert first_fit_decreasing([5] * 40, 50, 0) != first_fit_decreasing([5] * 40, 50, 1)
    assert first_fit_decreasing([], 50) == []
    with pytest.raises(ValueError, match="length 51 at 1 does not fit a row of 50 tokens"):
        first_fit_decreasing([3, 51], 50)


# -- laying side by side


def test_a_packed_batch_has_what_its_documents_had():
    batch = inputs("qwen2_5_vl", LONG)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    packed = pack_batch(batch, COUNTS, pad_token_id=PAD, pad_to_multiple_of=8)
    sizes = batch["attention_mask"].sum(1).tolist()
    assert packed["input_ids"].shape == (3, -(-sum(sizes[:3]) // 8) * 8)
    found = documents_of(packed, packed["input_ids"])
    for ids, row, mask in zip(found, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        assert torch.equal(ids, row[mask])
    assert [len(ids) for ids in found] == sizes
    real = packed[DOCUMENT_IDS] > 0
    assert torch.equal(packed["attention_mask"].bool(), real)
    assert (packed["input_ids"][~real] == PAD).all() and (packed["labels"][~real] == -100).all()
    for labels, ids in zip(documents_of(packed, packed["labels"]), found, strict=True):
        assert labels[0] == -100 and torch.equal(labels[1:], ids[1:])  # nothing before it predicts the first
    assert torch.equal(packed["image_grid_thw"], batch["image_grid_thw"])
    documents = Documents(packed[DOCUMENT_IDS], packed["input_ids"].shape)
    alone = documents.split(packed["input_ids"], PAD)
    assert torch.equal(alone[documents.mask], batch["input_ids"][batch["attention_mask"].bool()])
    assert torch.equal(documents.join(alone, PAD), packed["input_ids"])


def test_tiles_of_one_row_stand_side_by_side():
    batch = inputs("idefics3", [["img:big", "c1", "t2"], ["t3"], ["t1", "img", "c1", "img:small", "c1"]])
    packed = pack_batch(batch, [1, 2], pad_token_id=PAD, images_by_row=True)
    assert packed["pixel_values"].shape[:2] == (2, 5)
    mine = packed["pixel_values"].flatten(0, 1), batch["pixel_values"].flatten(0, 1)
    a, b = (tiles[tiles.flatten(1).any(1)] for tiles in mine)
    assert torch.equal(a, b)
    assert packed["pixel_attention_mask"].shape[:2] == (2, 5)
    assert packed["pixel_attention_mask"].flatten(2).any(-1).sum(1).tolist() == [5, 4]


def test_errors_of_packing_say_what_is_wrong():
    batch = inputs("llava_llama", LONG)
    with pytest.raises(ValueError, match=r"sample 0, sample 1: \d+ tokens in a row of max_length=20, and "):
        pack_batch(batch, [2, 4], pad_token_id=PAD, max_length=20)
    with pytest.raises(ValueError, match="sum to 6 documents"):
        pack_batch(batch, [2, 3], pad_token_id=PAD)
    for wrong in ([[1, 2, 1, 0]], [[1, 0, 1, 2]], [[-1, 1, 1, 1]]):
        with pytest.raises(ValueError, match="every document in one piece"):
            Documents(torch.tensor(wrong), (1, 4))
    with pytest.raises(ValueError, match=r"shape of input_ids, \(1, 5\), not \(1, 4\)"):
        Documents(torch.ones(1, 4), (1, 5))


# -- as if alone

CASES = [
    (n, r, a)
    for n in NAMES
    for r in RULES
    for a in ("dense", "segmented")
    if (n in CORE or r == "isolated") and n != "llama4"
]


@pytest.mark.parametrize(
    ("name", "rule", "attention"),
    combined(CASES, lambda n, r, a: quick_rule(n, r) and (n in CORE or a == "dense")),
)
def test_logits_are_those_of_each_conversation_alone(name, rule, attention):
    model = shared(name, torch.float32, "sdpa", rule, attention)
    rows = rows_for(rule, LONG)
    _, packed = packed_inputs(model, name, rows)
    with torch.no_grad():
        found = documents_of(packed, model(**packed).logits)
        for i, logits in enumerate(found):
            alone = model(**inputs(name, [rows[i]], first_row=i)).logits[0]
            assert (logits - alone).abs().max() <= 1e-5 * alone.abs().max(), i


@pytest.mark.parametrize("attention", ["dense", "segmented"])
@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "gemma3"])
def test_the_eager_kernel_and_the_causal_rule_too(name, attention):
    eager = shared(name, torch.float32, "eager", "isolated", attention)
    causal = attached(name, rule="causal", attention=attention)
    for model in (eager, causal):
        _, packed = packed_inputs(model, name, LONG)
        with torch.no_grad():
            found = documents_of(packed, model(**packed).logits)
            for i, logits in enumerate(found):
                alone = model(**inputs(name, [LONG[i]], first_row=i)).logits[0]
                assert (logits - alone).abs().max() <= 1e-5 * alone.abs().max(), i


@pytest.mark.parametrize("rule", ["isolated", "sequential"])
@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_positions_start_anew_in_each_document(name, rule):
    """Exactly: a rotary encoding hides a shift of a whole document from the logits."""
    model = shared(name, torch.float32, "sdpa", rule)
    attachment, backbone = vp.attachment(model), model.base_model
    _, packed = packed_inputs(model, name, LONG)
    prepared = _prepare(attachment, backbone, (), packed, ONE_PASS)
    kwargs, table = prepared.kwargs, prepared.running.rule.table
    assert DOCUMENT_IDS not in kwargs and DOCUMENT_IDS in packed
    found = kwargs["position_ids"]
    axes = found.movedim(0, -1) if found.dim() == 3 else found
    for i, positions in enumerate(documents_of(packed, axes)):
        batch = inputs(name, [LONG[i]], first_row=i)
        alone = _prepare(attachment, backbone, (), batch, ONE_PASS)
        if alone.running.rule is None:  # text alone: the backbone counts it
            expected = torch.arange(batch["input_ids"].shape[1])
            expected = expected[:, None].expand(-1, 3) if found.dim() == 3 else expected
        else:
            expected = alone.kwargs["position_ids"].movedim(-2, 0)[0].movedim(0, -1)
        assert torch.equal(positions, expected), i
    inside = table.block >= 0
    assert inside.any()
    for row in range(3):  # a block's number is its own in the whole row, whoever reads it
        pairs = set(
            zip(
                table.block[row][inside[row]].tolist(), table.document[row][inside[row]].tolist(), strict=True
            )
        )
        assert sorted(block for block, _ in pairs) == list(range(len(pairs)))


def token_mean(model, batch):
    """The mean loss of the batch's text tokens, each predicted from the one before."""
    labels = batch["labels"][:, 1:]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize("attention", ["dense", "segmented"])
@pytest.mark.parametrize("name", CORE)
def test_loss_and_gradients_are_those_of_the_unpacked_batch(name, attention):
    model = shared(name, torch.float32, "sdpa", "isolated", attention)
    batch = inputs(name, LONG)
    vocab = vp.attachment(model).vocab
    special = {vocab.voco_id, PAD, *vocab.placeholders, *vocab.markers}
    is_text = torch.tensor([[int(t) not in special for t in row] for row in batch["input_ids"]])
    batch["labels"] = torch.where(is_text & batch["attention_mask"].bool(), batch["input_ids"], -100)
    by_row = vp.attachment(model).family.images_by_row
    packed = pack_batch(batch, COUNTS, pad_token_id=PAD, images_by_row=by_row)
    losses, gradients = [], []
    for each in (batch, packed):
        model.zero_grad()
        loss = token_mean(model, each)
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    worst = max(float(g.abs().max()) for g in gradients[0].values())
    for key, grad in gradients[0].items():
        assert (grad - gradients[1][key]).abs().max() <= 1e-5 * worst, key


@pytest.mark.parametrize("attention", ["dense", "segmented"])
@pytest.mark.parametrize(
    "name", ["llava_llama", "llava_mistral", "qwen2_5_vl", "gemma3", "paligemma", "idefics3"]
)
def test_a_document_changes_no_bit_of_another(name, attention):
    model = shared(name, torch.float32, "sdpa", "isolated", attention)
    rows = [["t3", "img", "c2", "t4"], ["bos", "t2", "img", "c2", "t5"], ["t6"]]
    _, packed = packed_inputs(model, name, rows, [3])
    changed = {k: v.clone() for k, v in packed.items()}
    first = packed[DOCUMENT_IDS][0] == 1
    changed["input_ids"][0, 0] = packed["input_ids"][0, 1]
    assert not torch.equal(changed["input_ids"], packed["input_ids"])
    pixels = changed["pixel_values"]
    if name == "idefics3":
        pixels[0, : pixels.shape[1] // 2] += 1.0
    else:
        pixels[: len(pixels) // 2] += 1.0
    with torch.no_grad():
        a, b = model(**packed).logits[0], model(**changed).logits[0]
    assert not torch.equal(a[first], b[first])
    assert torch.equal(a[~first], b[~first])


@settings(max_examples=30, deadline=None)
@given(
    tables(most_blocks=4, largest=40),
    st.sampled_from(["isolated", "star", "causal"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_segments_of_documents_equal_dense_on_any_layout(table, rule, prefix, hide, seed):
    table = numbered(table, torch.Generator().manual_seed(seed))
    config = vp.VoCoConfig(
        rule=rule, block_context="prefix" if prefix else "self", hide_prefix=hide, positions="sequential"
    )
    for function in (causal_mask_function, sliding_window_causal_mask_function(9)):
        (a, grads_a), (b, grads_b), _ = both(config, table, function)
        assert (a - b).abs().max() <= 1e-9
        assert all((x - y).abs().max() <= 1e-9 for x, y in zip(grads_a, grads_b, strict=True))


def test_segments_run_where_rows_are_packed(monkeypatch):
    plans = []
    real = interface.run_plan
    monkeypatch.setattr(
        interface, "run_plan", lambda plan, *a, **k: (plans.append(plan), real(plan, *a, **k))[1]
    )
    for rule in ("isolated", "causal"):
        model = attached("llava_llama", attention="segmented", rule=rule)
        model(**packed_inputs(model, "llava_llama", [["t5"], ["t3"], ["t5"], ["t5"]], [2, 2])[1])
        assert [(g.count, g.rows) for g in plans[-1].groups] == [(3, 5), (1, 3)]  # equal sizes are one call
        assert plans[-1].mask_bytes == 0


def test_the_table_keeps_its_documents():
    kind = torch.tensor([[1, 1, 1], [1, 1, 0]])
    made = TokenTable(kind, kind - 2, kind.cumsum(1), torch.tensor([[1, 1, 2], [1, 2, 0]]))
    assert made.crop(2).document.tolist() == [[1, 1], [1, 2]]
    twice = made.each(lambda value: value.repeat_interleave(2, dim=0))
    assert twice.document.tolist() == [[1, 1, 2]] * 2 + [[1, 2, 0]] * 2
    assert made.each(lambda value: value[[1]]).document.tolist() == [[1, 2, 0]]
    assert made.pad_to(5).document.tolist() == [[1, 1, 2, 0, 0], [1, 2, 0, 0, 0]]
    assert made.to("cpu").document is not None
    bare = TokenTable(kind, kind, kind)
    assert bare.append(bare).document is None and bare.pad_to(5).document is None
    assert made.append(bare).document.tolist() == [[1, 1, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0]]


def test_what_packed_rows_cannot_be_is_refused():
    model = shared("llava_llama")
    _, packed = packed_inputs(model, "llava_llama", LONG)
    past = cache_of(model(**packed, use_cache=True))
    more = {"input_ids": torch.full((3, 1), 5), **as_cache(past)}
    with pytest.raises(ValueError, match="written by packed rows"):
        model(**more)
    with pytest.raises(ValueError, match="beside a filled KV cache"):
        model(**more, document_ids=torch.ones(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="just where document_ids is not 0"):
        model(**{**packed, "attention_mask": torch.ones_like(packed["attention_mask"])})
    with pytest.raises(ValueError, match="document_ids need input_ids"):
        embeds = model.get_input_embeddings()(packed["input_ids"])
        model(inputs_embeds=embeds, document_ids=packed[DOCUMENT_IDS])
    with pytest.raises(ValueError, match=r"Llama4\w* attends in chunks of 8 tokens"):
        chunked = shared("llama4")
        chunked(**packed_inputs(chunked, "llama4", LONG)[1])


def test_a_single_document_is_an_ordinary_row():
    model = shared("llava_llama")
    batch = inputs("llava_llama", ROWS[:1])
    alone = model(**batch).logits
    assert torch.equal(model(**batch, document_ids=batch["attention_mask"]).logits, alone)


@pytest.mark.slow
@torch.no_grad()
def test_flex_keeps_block_masks_of_packed_rows_apart():
    """The same kinds and blocks with other documents are another mask, also where masks are kept."""
    from voco_plugin.core.attention import flex

    flex._masks.clear()
    model, reference = (shared("llava_llama", attention=a) for a in ("flex", "dense"))
    found = []
    for counts in ([2, 1], [1, 2]):
        rows = [["bos", "img", "c2", "t3"]] * 3
        _, packed = packed_inputs(model, "llava_llama", rows, counts)
        real = packed["attention_mask"].bool()
        expected = reference(**packed).logits[real]
        assert (model(**packed).logits[real] - expected).abs().max() <= 1e-4
        found.append(len(flex._masks))
    one = {k: v for k, v in packed.items() if k != DOCUMENT_IDS}
    whole = model(**one).logits[packed["attention_mask"].bool()]
    assert (whole - reference(**one).logits[packed["attention_mask"].bool()]).abs().max() <= 1e-4
    assert found == [1, 2] and len(flex._masks) == 3
