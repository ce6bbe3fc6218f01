"""Stage 1 in groups: blocks of one length in one forward, each with its own pixels, against the single pass.

The reference is the masked single pass over the batch as it is: the keys and values that its own cache holds
at the VoCo tokens. It shares neither the grouping nor the splitting of pixels with `compress`.
"""

from __future__ import annotations

import contextlib
import logging
import threading

import pytest
import torch
from transformers import DynamicCache

from harness import RULES, inputs, layout_of, rows_for, shared
from tiny import NAMES
from tiny.inputs import image_sizes
from tiny.wide import BACKBONES
from voco_plugin.cache.compress import last_rows, stage_one
from voco_plugin.cache.compress.batching import Limits
from voco_plugin.cache.compress.memory import readable, working_memory
from voco_plugin.core.forward import as_cache
from voco_plugin.core.layout import BlockSpan, TokenVocabulary

SIZED = [
    ["bos", "t3", "img", "c2", "t4"],
    ["t2", "img:big", "c2", "t1", "img:small", "c2", "t5"],
    ["bos", "t6"],
    ["img", "c2", "t1", "img:big", "c1", "t2"],
    ["img:small", "c2", "t2"],
]
"""Rows with 0, 1 and 2 images, of three sizes where the family has them."""

BY_ROW = ("idefics2", "idefics3", "smolvlm")
UNDIVIDED = {"llava_onevision": [0, 1, 3, 5, 6]}
"""Families that keep blocks together: OneVision tiles an image only where it is alone in its row."""


def sized(name: str, rows=SIZED):
    """``rows`` with the image sizes that the family has."""
    known = image_sizes(name)
    return [
        ["img" if s.startswith("img") and s.partition(":")[2] not in known else s for s in row]
        for row in rows
    ]


def tensors(block):
    return (*block.keys, *block.values)


def difference(a, b) -> float:
    """The largest difference of two blocks; their facts must be equal."""
    facts = [(x.position, x.extent, x.num_vision, x.num_tokens, x.order) for x in (a, b)]
    assert facts[0] == facts[1]
    return max(float((x - y).abs().max()) for x, y in zip(tensors(a), tensors(b), strict=True))


def single_pass(model, batch):
    """Per block, in order, what the single pass under the rule has at its VoCo tokens, layer by layer."""
    cache = DynamicCache()
    with torch.no_grad():
        model(**batch, **as_cache(cache), use_cache=True)
    found = []
    for span in layout_of(model, batch):
        slots = slice(span.voco, span.stop)
        parts = [[t[span.row, :, slots] for t in (layer.keys, layer.values)] for layer in cache.layers]
        found.append((*(p[0] for p in parts), *(p[1] for p in parts)))
    return found


def against_single_pass(model, batch, cache) -> float:
    expected = single_pass(model, batch)
    assert len(expected) == len(cache)
    return max(
        float((x - y).abs().max())
        for block, reference in zip(cache, expected, strict=True)
        for x, y in zip(tensors(block), reference, strict=True)
    )


@contextlib.contextmanager
def watched(monkeypatch):
    """What `compress` decided: the vision inputs of a call, the rows of its forwards, the last layer's
    plans.
    """
    seen = {"vision": [], "forwards": [], "plans": []}
    vision, forward, rows = stage_one.vision_inputs, stage_one._forward, stage_one.plan_last_rows

    def spy_vision(*args, **kwargs):
        seen["vision"].append(vision(*args, **kwargs))
        return seen["vision"][-1]

    def spy_forward(state, model, run, cache, mode):
        mask = run["attention_mask"]
        seen["forwards"].append((*mask.shape, bool(mask.all()), mode.rule))
        return forward(state, model, run, cache, mode)

    def spy_rows(*args):
        seen["plans"].append(rows(*args))
        return seen["plans"][-1]

    with monkeypatch.context() as patch:
        patch.setattr(stage_one, "vision_inputs", spy_vision)
        patch.setattr(stage_one, "_forward", spy_forward)
        patch.setattr(stage_one, "plan_last_rows", spy_rows)
        yield seen


# -- every family
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_groups_equal_the_single_pass_and_nothing_is_padded(name, monkeypatch):
    model = shared(name)
    for side in ("right", "left"):
        batch = inputs(name, sized(name), side)
        with watched(monkeypatch) as seen:
            cache = model.compress(**batch)
        assert cache.num_tokens == [2, 2, 2, 2, 1, 2] and cache.rows == (0, 1, 1, 3, 3, 4)
        assert against_single_pass(model, batch, cache) <= 1e-5
    assert seen["vision"][0].bounds == UNDIVIDED.get(name, [0, 1, 2, 3, 4, 5, 6])
    padded = [f for f in seen["forwards"] if not f[2]]
    assert len(padded) == (name in UNDIVIDED), "padded only where two images of a row run together"
    assert sum(rows for rows, *_ in seen["forwards"]) == 6
    # Llama 4's chunks are cut where the block stands in its prompt; PaliGemma without a mask is not causal
    ruled = name in ("llama4", "paligemma", "paligemma2")
    assert {rule for *_, full, rule in seen["forwards"] if full} == {ruled}
    assert all(plan.cut and plan.reason is None for plan in seen["plans"]), "the last layer is cut"


@pytest.mark.parametrize("name", [n for n in NAMES if "token_type_ids" in inputs(n, [["t1"]])])
def test_without_token_types_too(name):
    """What a prompt read both ways, or an image, is when its types are left out: causal."""
    model = shared(name)
    batch = {k: v for k, v in inputs(name, sized(name)).items() if k != "token_type_ids"}
    assert against_single_pass(model, batch, model.compress(**batch)) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_another_order_give_the_same_blocks(name):
    """Every image differs; a block must follow its own pixels wherever its row goes, one forward or many."""
    model, rows, order = shared(name), sized(name), [3, 2, 4, 0, 1]
    straight = model.compress(**inputs(name, rows))
    parts = [inputs(name, [rows[i]], first_row=i) for i in order]  # the same images as in the whole batch
    tokens = 1 + max(b.num_vision + b.num_tokens for b in straight)
    for limits in ({}, {"max_batch_tokens": 2 * tokens}):
        mixed = model.compress(**joined(name, parts), **limits)
        for place, row in enumerate(order):
            for a, b in zip(mixed.row(place), straight.row(row), strict=True):
                assert (
                    max(float((x - y).abs().max()) for x, y in zip(tensors(a), tensors(b), strict=True))
                    <= 1e-5
                )
    flat = [b for b in straight if b.num_vision == straight.blocks[0].num_vision and b.num_tokens == 2]
    assert len(flat) > 1 and float((flat[0].keys[-1] - flat[1].keys[-1]).abs().max()) > 1e-2, "images differ"


def joined(name, parts):
    """Batches of one row each as one batch: tokens right-padded, vision inputs one after the other."""
    length = max(p["input_ids"].shape[1] for p in parts)
    out = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [p[key] for p in parts if key in p]
        if values[0].dim() == 2 and len(values) == len(parts) and key.endswith(("_ids", "_mask")):
            out[key] = torch.cat([torch.nn.functional.pad(v, (0, length - v.shape[1])) for v in values])
        elif name in BY_ROW:  # a row without images has zeros
            most = max(v.shape[1] for v in values)
            example = values[0][0, 0]
            rows = [p.get(key, example.new_zeros(1, 0, *example.shape)) for p in parts]
            out[key] = torch.cat(
                [torch.cat([r, r.new_zeros(1, most - r.shape[1], *r.shape[2:])], dim=1) for r in rows]
            )
        else:
            out[key] = torch.cat(padded_tiles(values))
    return out


def padded_tiles(values):
    """``(images, tiles, 3, H, W)`` of one number of tiles; other shapes as they are."""
    most = max((v.shape[1] for v in values if v.dim() == 5), default=0)
    more = [most - v.shape[1] if v.dim() == 5 else 0 for v in values]
    return [
        torch.nn.functional.pad(v, (0, 0) * 3 + (0, m)) if m else v for v, m in zip(values, more, strict=True)
    ]


@pytest.mark.parametrize("rule", [r for r in RULES if r != "isolated"])
@pytest.mark.parametrize("name", ["llava_mistral", "qwen2_5_vl", "gemma3", "idefics3", "internvl"])
def test_groups_equal_the_single_pass_under_every_rule(name, rule, monkeypatch):
    model = shared(name, rule=rule)
    batch = inputs(name, rows_for(rule, sized(name)), "left")
    with watched(monkeypatch) as seen:
        cache = model.compress(**batch)
    assert against_single_pass(model, batch, cache) <= 1e-5
    ruled = {rule for *_, rule in seen["forwards"]}
    assert ruled == {rule in ("prefix", "star", "star-prefix", "rival-prefix")}


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_over_voco_rows_is_the_whole_one(name, monkeypatch):
    model, batch = shared(name), inputs(name, sized(name))
    cut = model.compress(**batch)
    monkeypatch.setattr(stage_one, "plan_last_rows", lambda *args: None)
    for a, b in zip(cut, model.compress(**batch), strict=True):
        assert difference(a, b) <= 2e-6 * max(float(t.abs().max()) for t in tensors(b))


# -- which rows are whose
# ------------------------------------------------------------------------------------------------------------

IMAGE, VIDEO, VOCO = 7, 8, 9
VOCAB = TokenVocabulary(voco_id=VOCO, placeholders=frozenset({IMAGE, VIDEO}))


class Ids:
    video_token_id = VIDEO


def cut_of(blocks, by_row=False, rows=None, config=Ids, **vision):
    """`vision_inputs` for blocks given as ``(row, image tokens[, video tokens])``."""
    lines: list[list[int]] = [[] for _ in range(1 + max(b[0] for b in blocks) if rows is None else rows)]
    spans = []
    for index, (row, images, *videos) in enumerate(blocks):
        line = lines[row]
        line.append(1)
        start = len(line)
        line += [IMAGE] * images + [VIDEO] * sum(videos) + [VOCO]
        spans.append(BlockSpan(row, index, start, len(line) - 1, len(line)))
    length = max(map(len, lines))
    ids = torch.tensor([line + [1] * (length - len(line)) for line in lines])
    return stage_one.vision_inputs({"input_ids": ids, **vision}, spans, VOCAB, config, by_row=by_row)


def pixels(*shape):
    """Rows that differ: row ``i`` starts with ``i + 1``."""
    out = torch.zeros(shape)
    out.view(shape[0], -1)[:, 0] = torch.arange(1, shape[0] + 1)
    return out


def rows_taken(found, bundle, name="pixel_values"):
    """The numbers of the rows that a bundle gets."""
    value = found.take([bundle]).get(name)
    return [] if value is None else [int(v) - 1 for v in value.reshape(len(value), -1)[:, 0]]


def test_images_listed_one_a_block():
    found = cut_of(
        [(0, 4), (1, 9), (1, 4)], pixel_values=pixels(3, 3, 8, 8), image_sizes=torch.arange(6).view(3, 2)
    )
    assert found.bounds == [0, 1, 2, 3] and found.reason is None
    assert [rows_taken(found, b) for b in found.bundles] == [[0], [1], [2]]
    both = found.take([(0, 1), (2, 3)])
    assert both["image_sizes"].tolist() == [[0, 1], [4, 5]] and len(both["pixel_values"]) == 2


def test_grids_count_patches_and_images_side_by_side_stay_in_their_block():
    grid = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 6]])  # 4, 2 and 6 tokens
    found = cut_of([(0, 6), (1, 6)], pixel_values=pixels(48, 5), image_grid_thw=grid)
    assert rows_taken(found, (0, 1)) == list(range(24)) and rows_taken(found, (1, 2)) == list(range(24, 48))
    assert found.take([(1, 2)])["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_a_video_whose_frames_are_blocks_stays_together():
    grid = torch.tensor([[3, 4, 4], [1, 4, 4]])  # three frames of 4 tokens, each a block; then one
    found = cut_of(
        [(0, 0, 4), (0, 0, 4), (0, 0, 4), (1, 0, 4)], pixel_values_videos=pixels(64, 5), video_grid_thw=grid
    )
    assert found.bundles == [(0, 3), (3, 4)] and "more than one block shares" in found.reason
    assert rows_taken(found, (3, 4), "pixel_values_videos") == list(range(48, 64))


def test_images_and_videos_are_counted_apart():
    vision = {
        "pixel_values": pixels(24, 5), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]]),
        "pixel_values_videos": pixels(32, 5), "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }  # fmt: skip
    found = cut_of([(0, 4), (0, 0, 8), (1, 2)], **vision)
    assert found.bounds == [0, 1, 2, 3]
    assert sorted(found.take([(1, 2)])) == ["pixel_values_videos", "video_grid_thw"]
    assert rows_taken(found, (2, 3)) == list(range(16, 24)) and len(rows_taken(found, (0, 1))) == 16

    class NoIds:
        pass

    found = cut_of([(0, 4), (0, 0, 8), (1, 2)], config=NoIds, **vision)
    assert found.bounds == [0, 3] and "no tokens of their own" in found.reason


def test_tiles_of_one_size_have_as_many_tokens_each():
    found = cut_of([(0, 12), (1, 4), (1, 8)], pixel_values=pixels(6, 3, 8, 8))
    assert [rows_taken(found, b) for b in found.bundles] == [[0, 1, 2], [3], [4, 5]]


def test_images_by_row_are_parted_by_their_tiles():
    given = pixels(9, 3, 2, 2).view(3, 3, 3, 2, 2).clone()
    given[2, 1:] = 0  # padding
    mask = torch.ones(3, 3, 2, 2)
    given[1] = 0  # a row without images
    blocks = [(0, 8), (0, 4), (2, 4)]
    found = cut_of(blocks, by_row=True, pixel_values=given, pixel_attention_mask=mask)
    assert found.bounds == [0, 1, 2, 3]
    assert found.take([(0, 1)])["pixel_values"].shape == (1, 2, 3, 2, 2)
    assert found.take([(0, 1), (2, 3)])["pixel_values"][0, :, 0, 0, 0].tolist() == [1, 2, 7]
    assert found.take([(1, 2)])["pixel_attention_mask"].shape == (1, 1, 2, 2)
    wrong = cut_of([(0, 4), (0, 4), (2, 8)], by_row=True, pixel_values=given)
    assert wrong.bounds == [0, 3] and "tiles of batch row 0 do not fit" in wrong.reason


def test_a_row_of_images_is_told_from_a_list_of_them():
    """Three batch rows, three blocks, three rows of tiles: listed, or laid out by row? A picture in a row
    without images says that they are listed; zeros there leave it open.
    """
    given = pixels(3, 2, 3, 2, 2)
    blocks = [(0, 4), (0, 4), (2, 4)]
    assert cut_of(blocks, pixel_values=given).bounds == [0, 1, 2, 3]
    given[1] = 0
    found = cut_of(blocks, pixel_values=given)
    assert found.bounds == [0, 3] and "listed or laid out by row" in found.reason
    assert cut_of([(0, 4), (1, 4), (2, 4)], pixel_values=given).bounds == [0, 1, 2, 3], "the same either way"


TILES = {"pixel_values": pixels(2, 3, 8, 8)}
PAIR = [(0, 4), (1, 4)]
UNCLEAR = {
    "five tiles, two blocks": ([(0, 6), (1, 6)], {"pixel_values": pixels(5, 3, 8, 8)}, "nothing tells whose"),
    "alike": ([(0, 6), (1, 3)], TILES, "alike have different numbers"),
    # 2 + 2 + 2 tokens side by side, then 6: as many as four equal units would have, but their sizes differ
    "four images, two blocks": (
        [(0, 6), (1, 6)],
        {"pixel_values": pixels(4, 3, 8, 8), "image_sizes": torch.tensor([[1], [1], [1], [3]])},
        "nothing tells whose",
    ),
    "unknown input": (PAIR, {**TILES, "tile_map": torch.ones(2)}, "tile_map is an input of unknown meaning"),
    "a list": (PAIR, {"pixel_values": [pixels(1, 3, 8, 8)] * 2}, "pixel_values is a list"),
    "other rows": (PAIR, {**TILES, "image_sizes": torch.ones(3, 2)}, "image_sizes has 3 rows where 2"),
    "no pixels": (PAIR, {"image_sizes": torch.ones(2, 2)}, "without pixels"),
    "per token": (PAIR, {**TILES, "image_mask": torch.ones(2, 6).long()}, "shape says both"),
    "entries": (
        [(0, 4), (0, 4), (1, 4)],
        {"pixel_values": pixels(3, 3, 8, 8), "batch_num_images": torch.tensor([3, 1])},
        "counts 4 images where 3",
    ),
    "half an image": (
        [(0, 3), (1, 5)],
        {"pixel_values": pixels(32, 5), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)},
        "more than one block shares",
    ),
}


@pytest.mark.parametrize(("blocks", "vision", "reason"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_cannot_be_told_stays_together_and_says_why(blocks, vision, reason):
    found = cut_of(blocks, **vision)
    assert found.bounds == [0, len(blocks)] and reason in found.reason
    taken = found.take(found.bundles)
    assert list(taken) == list(vision)
    for name, value in vision.items():
        assert taken[name] is value or torch.equal(taken[name], value)


def test_settings_go_to_every_forward():
    found = cut_of(
        [(0, 4), (1, 4)], pixel_values=pixels(2, 3, 8, 8), vision_feature_layer=[-2, -1], flag=True
    )
    for bundle in found.bundles:
        taken = found.take([bundle])
        assert taken["vision_feature_layer"] == [-2, -1] and taken["flag"] is True


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_images_and_videos_in_one_batch(name):
    rows = [
        ["img", "c2", "t1", "vid", "c2", "t2"],
        ["vid", "c2", "t1"],
        ["t1", "img:big", "c2"],
        ["img", "c2"],
    ]
    model, batch = shared(name), inputs(name, rows)
    assert against_single_pass(model, batch, model.compress(**batch)) <= 1e-5


def test_pixels_as_wide_as_the_prompt_are_not_taken_for_tokens():
    """Patches ``(P, D)`` that happen to have the shape of ``input_ids``."""
    model = shared("qwen2_5_vl")
    rows = [["img", "c2", "t1"]] * 24
    rows[0] = ["img", "c2", f"t{96 - 10}"]
    batch = inputs("qwen2_5_vl", rows)
    batch["pixel_values"] = batch["pixel_values"][:24]
    short = {k: v[:1] for k, v in batch.items() if k != "pixel_values"}
    assert batch["pixel_values"].shape == batch["input_ids"].shape
    batch["image_grid_thw"] = short["image_grid_thw"]
    only = {k: v.clone() for k, v in batch.items()}
    only["input_ids"][1:] = 5  # text rows: one image, 24 patches, 24 rows
    only["mm_token_type_ids"][1:] = 0
    cache = model.compress(**only)
    alone = model.compress(**{**short, "pixel_values": batch["pixel_values"]})
    assert difference(cache.blocks[0], alone.blocks[0]) <= 1e-5


# -- limits
# ------------------------------------------------------------------------------------------------------------


def test_chunks_fit_the_limit_and_change_nothing(monkeypatch):
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["img", "c2", "t1"]] * 7)
    whole = model.compress(**batch)
    with watched(monkeypatch) as seen:
        cut = model.compress(**batch, max_batch_tokens=2 * 11 + 5)
    assert [rows for rows, *_ in seen["forwards"]] == [2, 2, 2, 1]
    one = working_memory(model, 11, 2, 3 * 12 * 12 + 1)
    with watched(monkeypatch) as seen:
        more = model.compress(**batch, max_memory=3 * one + 10)
    assert [rows for rows, *_ in seen["forwards"]] == [3, 3, 1]
    for cache in (cut, more):
        assert all(difference(a, b) <= 1e-5 for a, b in zip(cache, whole, strict=True))
    with pytest.raises(
        ValueError, match=r"max_memory=1000 \(1000 bytes\) is too little: one image of 11 tokens"
    ):
        model.compress(**batch, max_memory=1000)
    with pytest.raises(ValueError, match="max_batch_tokens=10 is too little: one image of 11 tokens have 11"):
        model.compress(**batch, max_batch_tokens=10)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2GB"])
def test_a_limit_is_a_whole_number(value):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        Limits(max_memory=value)


def test_images_that_cannot_be_parted_are_refused_where_they_do_not_fit():
    model = shared("llava_llama")
    batch = inputs("llava_llama", [["img", "c2", "t1"]] * 4)
    batch["pixel_values"] = list(batch["pixel_values"][:, None])
    message = r"4 images that run together of 11 tokens \(pixel_values is a list.*give fewer images at once"
    with pytest.raises(ValueError, match=message):
        model.compress(**batch, max_batch_tokens=40)
    prefix = shared("llava_llama", rule="prefix")
    batch = inputs("llava_llama", [["img", "c2", "t1"]] * 4)
    with pytest.raises(ValueError, match="computes whole rows.*give fewer images at once"):
        prefix.compress(**batch, max_memory=10_000)
    assert len(prefix.compress(**batch, max_memory=10**9)) == 4


def test_blocks_of_different_lengths_that_run_together_are_padded(monkeypatch):
    """Images of unknown pixels: one forward, as long as the longest, and still exact."""
    model, batch = shared("internvl"), inputs("internvl", sized("internvl"))
    monkeypatch.setattr(
        stage_one,
        "vision_inputs",
        lambda given, spans, *a, **k: stage_one.VisionInputs(
            {n: v for n, v in given.items() if n != "input_ids"}, {}, [0, len(spans)], "told so"
        ),
    )
    cache = model.compress(**batch)
    assert against_single_pass(model, batch, cache) <= 1e-5


def test_only_the_voco_tokens_keys_are_ever_kept(monkeypatch):
    made = []
    real = stage_one.LastSlotsCache
    monkeypatch.setattr(stage_one, "LastSlotsCache", lambda *args: made.append(real(*args)) or made[-1])
    model = shared("qwen3_vl")
    cache = model.compress(**inputs("qwen3_vl", [["img", "c3", "t1"]] * 2))
    (kept,) = made
    assert [layer.keys.shape[2] for layer in kept.layers] == [3] * 3
    held = {layer.keys.untyped_storage().data_ptr() for layer in kept.layers}
    assert not held & {t.untyped_storage().data_ptr() for b in cache for t in b.keys}, "a block holds its own"
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 for b in cache for t in tensors(b))


def test_the_estimate_grows_with_what_it_counts():
    model = shared("llava_llama")
    base = working_memory(model, 100, 2, 1000)
    assert working_memory(model, 200, 2, 1000) > base < working_memory(model, 100, 2, 2000)
    assert working_memory(model, 100, 2, 1000, whole=True) > base
    assert abs(working_memory(model, 100, 2, 1000, rows=3) - 3 * base) < 10
    eager = shared("llava_llama", attn="eager")
    eager.get_decoder().config._attn_implementation_internal = "eager"
    assert working_memory(eager, 100, 2, 1000) > base
    assert [readable(n) for n in (10, 1536, 3 << 30)] == ["10 bytes", "1.5 KiB", "3.0 GiB"]


# -- the hooks of the last layer
# ------------------------------------------------------------------------------------------------------------


def hooks_of(model):
    layers = shared_layers(model)
    modules = (layers[-1], layers[-2].mlp)
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def shared_layers(model):
    return model._voco_attachment.family.text_model(model).layers


def test_hooks_are_gone_afterwards_and_after_an_error(monkeypatch):
    model, batch = shared("llava_llama"), inputs("llava_llama", [["img", "c2", "t1"]])
    model.compress(**batch)
    assert hooks_of(model) == 0 and not last_rows._USERS
    with monkeypatch.context() as patch:
        patch.setattr(shared_layers(model)[-1].self_attn, "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.compress(**batch)
    assert hooks_of(model) == 0 and not last_rows._USERS
    assert against_single_pass(model, batch, model.compress(**batch)) <= 1e-5


def test_an_argument_of_unknown_meaning_leaves_the_layer_whole(monkeypatch, caplog):
    model, batch = shared("llava_llama"), inputs("llava_llama", [["img", "c2", "t1"]])
    layer = shared_layers(model)[-1]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "tile_map": torch.ones(11)}), with_kwargs=True
    )
    try:
        with (
            watched(monkeypatch) as seen,
            caplog.at_level(logging.DEBUG, "voco_plugin.cache.compress.last_rows"),
        ):
            cache = model.compress(**batch)
    finally:
        handle.remove()
    assert not seen["plans"][0].cut and "tile_map is not known" in caplog.text
    assert against_single_pass(model, batch, cache) <= 1e-5


def test_another_threads_forward_is_not_cut():
    """While one thread compresses, another reads a text as long as the block, whole."""
    model, batch = shared("llava_llama"), inputs("llava_llama", [["img", "c2", "t1"]])
    text = inputs("llava_llama", [["t11"]])
    expected, seen = model(**text).logits, []

    def read():
        with torch.no_grad():
            seen.append(torch.equal(model(**text).logits, expected))

    def meanwhile(module, args):
        if not seen and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()

    handle = shared_layers(model)[0].register_forward_pre_hook(meanwhile)
    try:
        cache = model.compress(**batch)
    finally:
        handle.remove()
    assert seen == [True] and against_single_pass(model, batch, cache) <= 1e-5


def test_threads_that_compress_at_once_do_not_disturb_each_other():
    model = shared("llava_llama")
    batches = [inputs("llava_llama", [["img", f"c{k}", "t1"]]) for k in (1, 2)]
    alone, wrong = [model.compress(**batch) for batch in batches], []

    def squeeze(which):
        for _ in range(30):
            if difference(model.compress(**batches[which]).blocks[0], alone[which].blocks[0]) > 0:
                wrong.append(which)

    threads = [threading.Thread(target=squeeze, args=(which,)) for which in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and hooks_of(model) == 0 and not last_rows._USERS


@pytest.mark.parametrize(("layers", "sharing"), [(3, 0), (4, 2)])
def test_layers_that_share_keys_get_them_whole(layers, sharing, monkeypatch):
    """Gemma 4's last layers may read the keys of earlier ones: nothing is cut, and stage 1 is the same."""
    import transformers

    import voco_plugin as vp
    from harness import vocabulary
    from tiny import voco_id

    config = BACKBONES["gemma4"].config()
    text = config.text_config.to_dict()
    text |= {"num_kv_shared_layers": sharing, "num_hidden_layers": layers}
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2 if layers == 4 else text["layer_types"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.Gemma4Config(**{**config.to_dict(), "text_config": text})
        model = transformers.AutoModelForImageTextToText.from_config(made, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all():
                torch.nn.init.normal_(parameter, std=0.2)
    rule = vp.VoCoConfig(token_id=voco_id("gemma4"))
    model = vp.attach(model, rule, vocabulary=vocabulary("gemma4", model, rule))
    batch = inputs("gemma4", sized("gemma4"))
    with watched(monkeypatch) as seen:
        cache = model.compress(**batch)
    assert cache.blocks[0].num_layers == layers - sharing and len(seen["plans"]) == (0 if sharing else 2)
    assert against_single_pass(model, batch, cache) <= 1e-5


@pytest.mark.slow
def test_the_benchmark_measures_speed_and_memory(tmp_path):
    import json

    from benchmarks.stage_one import main

    more = ["--batch", "1", "--repeats", "1", "--counts", "1,20", "--out", str(tmp_path / "x.json")]
    assert main(more) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert [entry["tower"] for entry in found["speed"]] == [True, False]
    assert all(entry["ratio"] > 0 and entry["tokens"] == 578 for entry in found["speed"])
    assert [entry["images"] for entry in found["memory"]] == [1, 20]
    assert all(0 < entry["peak_bytes"] < entry["estimate_bytes"] for entry in found["memory"])


def test_every_family_is_here():
    assert len(NAMES) == 44 and set(BACKBONES) < set(NAMES)
